"""Every engine trains as one process does: per-step losses, gradient norms, weights, samples."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import launch, metrics, once, run_cli, shared, tiny, wait_for, write_config
from trainway.release.bundle import export

ENGINES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["engine.name=single"]),
    "ddp": (2, ["engine.name=ddp"]),
    "fsdp": (2, ["engine.name=fsdp"]),
    "hybrid": (2, ["engine.name=fsdp", "engine.sharding=hybrid", "engine.shard_ranks=1"]),
    "zero2": (2, ["engine.name=zero2"]),
    "zero3": (2, ["engine.name=zero3"]),
}
"""Every engine by the number of processes and settings."""
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "fsdp-alone": (1, ["engine.name=fsdp"]),
    "fsdp-offload": (2, ["engine.name=fsdp", "engine.cpu_offload=all"]),
    "fsdp-gathered": (2, ["engine.name=fsdp", "engine.reshard_after_forward=false"]),
    "fsdp-selective": (2, ["engine.name=fsdp", "train.activation_checkpointing=selective"]),
    "fsdp-full": (2, ["engine.name=fsdp", "train.activation_checkpointing=full"]),
    "ddp-selective": (2, ["engine.name=ddp", "train.activation_checkpointing=selective"]),
    "single-selective": (1, ["train.activation_checkpointing=selective"]),
    "single-full": (1, ["train.activation_checkpointing=full"]),
    "single-async": (1, ["checkpoint.async_save=true"]),
    "fsdp-async": (2, ["engine.name=fsdp", "checkpoint.async_save=true"]),
    "zero2-alone": (1, ["engine.name=zero2"]),
    "zero3-alone": (1, ["engine.name=zero3"]),
    "zero2-offload": (2, ["engine.name=zero2", "engine.cpu_offload=optimizer"]),
    "zero3-offload": (2, ["engine.name=zero3", "engine.cpu_offload=optimizer"]),
    "zero3-offload-all": (2, ["engine.name=zero3", "engine.cpu_offload=all"]),
    "zero3-selective": (2, ["engine.name=zero3", "train.activation_checkpointing=selective"]),
    "zero3-full": (2, ["engine.name=zero3", "train.activation_checkpointing=full"]),
    "zero3-async": (2, ["engine.name=zero3", "checkpoint.async_save=true"]),
}
DEEPSPEED = {name for name in ENGINES | VARIANTS if name.startswith("zero")}
SLOW = (DEEPSPEED & VARIANTS.keys()) | {
    "fsdp-alone",
    "fsdp-offload",
    "fsdp-gathered",
    "fsdp-selective",
    "fsdp-full",
    "ddp-selective",
    "single-full",
    "single-async",
}
CASES = [
    ("adamw", name, [pytest.mark.slow] if name in SLOW else [])
    for name in ENGINES | VARIANTS
    if name != "single"
]
CASES += [("muon", engine, [pytest.mark.slow]) for engine in ("ddp", "fsdp", "hybrid")]


class Runs:
    """Runs of the contract, each made when it is first asked for."""

    def __init__(self, root: Path, corpus: Path, store_dir: Path) -> None:
        self._root, self._corpus, self._store_dir = root, corpus, store_dir

    def __call__(self, optimizer: str, engine: str) -> Path:
        run = self._root / f"{optimizer}-{engine}"

        def make() -> None:
            config = tiny(self._corpus, self._store_dir, run)
            config["optim"] = {"lr": 3e-3, "name": optimizer}
            nproc, settings = (ENGINES | VARIANTS)[engine]
            run_cli("train", write_config(run.with_suffix(".yaml"), config), "--nproc", nproc, *settings)

        return once(run, make)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Runs:
    return Runs(shared(tmp_path_factory, "engines"), corpus, store_dir)


@pytest.mark.parametrize(
    ("optimizer", "engine"), [pytest.param(*case, marks=marks) for *case, marks in CASES]
)
def test_an_engine_trains_as_one_process_does(
    runs: Runs, tmp_path: Path, optimizer: str, engine: str
) -> None:
    single, other = runs(optimizer, "single"), runs(optimizer, engine)
    steps, other_steps = metrics(single), metrics(other)
    assert len(steps) == len(other_steps) == 20
    for a, b in zip(steps, other_steps, strict=True):
        assert a["samples"] == b["samples"]
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["optim/grad_norm"] == pytest.approx(a["optim/grad_norm"], rel=1e-5)
    for a, b in zip(metrics(single, "val/loss"), metrics(other, "val/loss"), strict=True):
        assert a["val/tokens"] == b["val/tokens"]
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)
    a, b = (
        load_file(export(run, tmp_path / run.name, which="latest") / "model.safetensors")
        for run in (single, other)
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)
    # greedy continuations of prompts: under fsdp all ranks generate together
    assert (single / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "hybrid", "zero2", "zero3")],
)
def test_bf16_shards_train_as_bf16_does(engine: str, tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    """Weights that travel in bf16 are those that autocast would have made of fp32 ones; DeepSpeed's model is bf16."""
    found = {}
    for name in ("single", engine):
        nproc, settings = ENGINES[name]
        path = write_config(
            tmp_path / f"{name}.yaml", tiny(corpus, store_dir, tmp_path / name, precision="bf16")
        )
        run_cli("train", path, "--nproc", nproc, *settings)
        found[name] = [record["train/loss"] for record in metrics(tmp_path / name)]
    assert found[engine] == pytest.approx(found["single"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_padding_of_three_ranks_never_reaches_a_file(
    engine: str, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    """No weight's elements are a multiple of 3; one process goes on from what three have saved."""
    batch = {"global_batch_size": 12}
    single = write_config(tmp_path / "s.yaml", tiny(corpus, store_dir, tmp_path / "single", **batch))
    run_cli("train", single)
    config = tiny(corpus, store_dir, tmp_path / "run", **batch)
    config["checkpoint"] = {"save_every": 10}
    path = write_config(tmp_path / "c.yaml", config)
    process = launch(path, "--nproc", "3", f"engine.name={engine}")
    wait_for(lambda: (tmp_path / "run/checkpoints/step-10").is_dir(), process, 300)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, (tmp_path / "launch.log").read_text()
    run_cli("train", path)
    for a, b in zip(metrics(tmp_path / "run"), metrics(tmp_path / "single"), strict=True):
        assert (a["step"], a["samples"]) == (b["step"], b["samples"])
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
    a, b = (
        load_file(export(tmp_path / name, tmp_path / f"{name}-out", which="latest") / "model.safetensors")
        for name in ("single", "run")
    )
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)


@pytest.mark.parametrize(
    "order",
    [
        ("fsdp", "zero3", "single"),
        pytest.param(
            ("fsdp", "zero3", "single", "zero2", "hybrid", "ddp", "zero3-alone"), marks=pytest.mark.slow
        ),
    ],
    ids=len,
)
def test_every_engine_goes_on_from_every_other(
    runs: Runs, tmp_path: Path, corpus: Path, store_dir: Path, order: tuple[str, ...]
) -> None:
    """Engines take turns in one run: the same rows and losses."""
    config = tiny(corpus, store_dir, tmp_path / "run")
    config["checkpoint"] = {"save_every": 3}
    path = write_config(tmp_path / "c.yaml", config)
    ends = [*range(3, 3 * len(order), 3), 20]
    for step, engine in zip(ends, order, strict=True):
        nproc, settings = (ENGINES | VARIANTS)[engine]
        process = launch(path, "--nproc", str(nproc), *settings)
        wait_for(lambda s=step: (tmp_path / f"run/checkpoints/step-{s}").is_dir(), process)
        if step < 20:
            process.send_signal(signal.SIGTERM)
        assert process.wait(120) == (75 if step < 20 else 0), (tmp_path / "launch.log").read_text()
    for a, b in zip(metrics(tmp_path / "run"), metrics(runs("adamw", "single")), strict=True):
        assert (a["step"], a["samples"]) == (b["step"], b["samples"])
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def test_groups_that_do_not_divide_the_ranks_are_refused(
    tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    settings = ["engine.name=fsdp", "engine.sharding=hybrid", "engine.shard_ranks=3"]
    done = run_cli("train", path, "--nproc", 2, *settings, check=2)
    assert "engine.shard_ranks 3 does not divide the 2 ranks" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_had_uneven_targets(corpus: Path, store_dir: Path, tmp_path: Path) -> None:
    """The equality above means something: a mean of the ranks' means would have been wrong."""
    from trainway.config.load import load_config
    from trainway.data.loader import Loader
    from trainway.data.prepare import prepare
    from trainway.data.store import TokenStore

    config = load_config(write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))).config
    split = TokenStore.open(prepare(config).store_dir).split("train")
    counts = []
    for rank in range(2):
        loader = Loader(
            split, seq_len=64, global_batch_size=8, micro_batch_size=2, seed=42, packing="documents", shuffle=True,
            rank=rank, world_size=2,
        )  # fmt: skip
        counts.append([loader.step(n).num_targets for n in range(1, 21)])
    assert counts[0] != counts[1]
