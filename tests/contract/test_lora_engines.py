"""Adapters train under every engine as on one process, and go on from every engine's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import launch_ranks, once, shared
from tests.lora_models import logits, plain
from tests.lora_worker import CASES, STEPS, Job
from trainway.checkpoint.weights import assemble, is_in_pieces, read_model_state

ENGINES = ("ddp", "fsdp")
BF16 = {"fp32": "one-layer", "bf16": "dora"}
"""For a frozen base in bf16: what is computed, by the precision of the matrix products."""


def launch(jobs: list[Job], nproc: int) -> None:
    """Run jobs on `nproc` ranks."""
    for job in jobs:
        Path(job.out).mkdir(parents=True)
    launch_ranks("tests.lora_worker", jobs, nproc)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one process and on two, from the start and from the middle of the other's run."""
    root = shared(tmp_path_factory, "lora-engines") / "runs"
    return once(root, lambda: _run_all(root))


def _run_all(root: Path) -> None:
    def job(name: str, case: str, engine: str, *rest: str) -> Job:
        return Job(str(root / name / case), case, engine, *rest)

    jobs = [job("single", case, "single") for case in CASES]
    jobs += [job(f"single-{p}", case, "single", "", p, "bfloat16") for p, case in BF16.items()]
    launch(jobs, 1)
    jobs = [job(engine, case, engine) for engine in ENGINES for case in CASES]
    jobs += [job(f"fsdp-{p}", case, "fsdp", "", p, "bfloat16") for p, case in BF16.items()]
    jobs += [
        job(f"{engine}-after-single", case, engine, str(root / "single" / case / "middle"))
        for engine in ENGINES
        for case in CASES
    ]
    launch(jobs, 2)
    jobs = [
        job(f"single-after-{engine}", case, "single", str(root / engine / case / "middle"))
        for engine in ENGINES
        for case in CASES
    ]
    launch(jobs, 1)


def records(run: Path) -> list[list[float]]:
    found: list[list[float]] = json.loads((run / "records.json").read_text())
    return found


def assert_same(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    first, second = read_model_state(a / "end" / "model"), read_model_state(b / "end" / "model")
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == torch.float32
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_adapters_train_as_on_one_process(runs: Path, case: str, engine: str) -> None:
    single, other = runs / "single" / case, runs / engine / case
    assert len(records(other)) == STEPS
    for (loss, norm), (other_loss, other_norm) in zip(records(single), records(other), strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-5)
    assert_same(single, other)
    assert is_in_pieces(other / "end" / "model") == (engine == "fsdp")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_adapters_goes_on_under_another_engine(runs: Path, case: str, engine: str) -> None:
    assert_same(runs / "single" / case, runs / f"single-after-{engine}" / case)
    assert_same(runs / "single" / case, runs / f"{engine}-after-single" / case)


@pytest.mark.parametrize("precision", BF16)
def test_a_frozen_bf16_base_has_fp32_adapters_under_fsdp(runs: Path, precision: str) -> None:
    alone, shards = (runs / f"{engine}-{precision}" / BF16[precision] for engine in ("single", "fsdp"))
    for (loss, norm), (other_loss, other_norm) in zip(records(alone), records(shards), strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-2)
        assert other_norm == pytest.approx(norm, rel=5e-2)
    assert {tensor.dtype for tensor in read_model_state(shards / "end" / "model").values()} == {torch.float32}


def test_checkpoints_hold_the_adapters_alone(runs: Path) -> None:
    """One rank's part, of weights and of the optimiser's state: what is trained, and nothing of the base."""
    part = runs / "fsdp" / "one-layer" / "end"
    names = [f"model.layers.1.self_attn.q_proj.lora_{kind}.default.weight" for kind in "AB"]
    keys = load_file(part / "optimizer.part-00000-of-00002.safetensors")
    assert {key.removeprefix("AdamW/").rpartition("/")[0] for key in keys} == set(names)
    assert sorted(path.name for path in (part / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.part-00000-of-00002.safetensors",
        "adapter_model.part-00001-of-00002.safetensors",
    ]
    state = read_model_state(part / "model")
    assert list(state) == ["base_model.model." + name.replace(".default", "") for name in names]


def test_parts_are_assembled_for_plain_peft(runs: Path, tmp_path: Path) -> None:
    source = runs / "fsdp" / "experts" / "end" / "model"
    assemble(source, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    model = peft.PeftModel.from_pretrained(plain("qwen3-moe"), tmp_path).eval()
    assert not torch.allclose(logits(model), logits(plain("qwen3-moe")), atol=1e-3)
    state = read_model_state(tmp_path)
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in state)
