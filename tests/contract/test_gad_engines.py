"""Adversarial distillation is the same on any engine and number of ranks, interrupted or not."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import kill_all, launch, once, run_cli, shared, wait_for, write_config
from tests.gad_material import KEYS, LORA, gad_stream, teacher, tiny_gad
from tests.sft_material import base_model
from trainway.release.bundle import export

ENGINES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["engine.name=single"]),
    "ddp": (2, ["engine.name=ddp"]),
    "fsdp": (2, ["engine.name=fsdp"]),
    "zero2": (2, ["engine.name=zero2"]),
    "zero3": (2, ["engine.name=zero3"]),
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA},
    "padded": {"data": {"packing": "none"}},
    "updates": {"gad": {"prompts_per_update": 2, "dual_clip": 3.0}},
}
OFTEN = {("full", "ddp"), ("full", "fsdp")}
CASES = [
    pytest.param(way, engine, marks=[] if (way, engine) in OFTEN else [pytest.mark.slow])
    for way in WAYS
    for engine in ENGINES
    if engine != "single"
]


class Runs:
    """Makes each run of this module once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = once(root / "rows.jsonl", lambda: teacher(root / "rows.jsonl"))
        self.base = once(root / "llama", lambda: base_model(root / "llama"))

    def config(self, way: str, run: Path, **sections: Any) -> dict[str, Any]:
        merged = {name: {**WAYS[way].get(name, {}), **values} for name, values in sections.items()}
        return tiny_gad(self.base, self.rows, self.root / "stores", run, **{**WAYS[way], **merged})

    def __call__(self, way: str, engine: str, *words: str, name: str = "") -> Path:
        run = self.root / (name or f"{way}-{engine}")

        def make() -> None:
            nproc, settings = ENGINES[engine]
            path = write_config(run.with_suffix(".yaml"), self.config(way, run))
            run_cli("train", path, "--nproc", nproc, *settings, *words, timeout=600)

        return once(run, make)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared(tmp_path_factory, "gad"))


def tensors(run: Path, out: Path, **which: Any) -> dict[str, torch.Tensor]:
    (found,) = export(run, out, which="latest", **which).glob("*.safetensors")
    return load_file(found)


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_an_engine_distils_as_one_process_does(runs: Runs, tmp_path: Path, way: str, engine: str) -> None:
    single, other = runs(way, "single"), runs(way, engine)
    assert len(gad_stream(single)) == len(gad_stream(other)) == 8
    for a, b in zip(gad_stream(single), gad_stream(other), strict=True):
        ours, theirs = dict(zip(KEYS, a, strict=True)), dict(zip(KEYS, b, strict=True))
        assert (ours["step"], ours["samples"]) == (theirs["step"], theirs["samples"])
        assert ours["gad/response_length"] == theirs["gad/response_length"]  # the same answers
        assert [key for key in KEYS if ours[key] is None] == [key for key in KEYS if theirs[key] is None]
        for key in [key for key in KEYS[2:] if ours[key] is not None]:
            tolerance = 1e-3 if key == "gad/kl" or key.endswith("norm") else 1e-5
            assert theirs[key] == pytest.approx(ours[key], rel=tolerance, abs=1e-6), (ours["step"], key)
    for part in ("model", "discriminator"):
        a, b = (tensors(run, tmp_path / f"{part}-{run.name}", part=part) for run in (single, other))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=5e-5)


def test_the_run_tells_its_story(runs: Runs) -> None:
    run = runs("full", "single")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "samples" in record]
    assert [record["gad/stage"] for record in steps] == ["warmup"] * 4 + ["adversarial"] * 4
    # the discriminator alone, then both
    assert ["train/student_loss" in record for record in steps] == [False] + [True] * 7
    assert ["gad/kl" in record for record in steps] == [False] * 4 + [True] * 4
    assert steps[4]["gad/kl"] == pytest.approx(
        0.0, abs=1e-9
    )  # the reference is the student that the stage began with
    assert steps[-1]["gad/kl"] > 1e-6
    checked = [record for record in records if "val/rouge_l" in record]
    assert [record["step"] for record in checked] == [0, 2, 4, 6, 8]
    log = (run / "log.txt").read_text()
    assert "warmup 4 steps (" in log
    assert "adversarial: steps 5 to 8, 4 of its own" in log
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4, 6, 8}
    assert samples[0]["teacher"].startswith("Well, ")
    names = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert names >= {"step-4", "step-6", "step-8"}  # keep_last is 2, but the reference is read from step 4


def test_eval_repeats_the_best_steps_validation(runs: Runs) -> None:
    run = runs("full", "single", "eval.num_prompts=100", name="whole-validation")  # all rows of the split
    best = int((run / "checkpoints/best").readlink().name.removeprefix("step-"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [record["val/loss"] for record in records if record["step"] == best and "val/loss" in record]
    found = json.loads(run_cli("eval", run, "--json").stdout)["models"][0]["figures"]
    assert found["val/loss"] == pytest.approx(loss, rel=1e-6)


def test_two_commands_are_one(runs: Runs) -> None:
    """stage=all is stage=warmup, then stage=adversarial from its checkpoint, bit for bit."""
    warmup = runs("full", "single", "gad.stage=warmup", name="warmup-alone")
    begun = runs("full", "single", "gad.stage=adversarial", f"warmup_run={warmup}", name="adversarial-alone")
    whole = gad_stream(runs("full", "single"))
    assert gad_stream(warmup) == whole[:4]
    assert [row[0] for row in gad_stream(begun)] == [1, 2, 3, 4]
    assert [row[1:] for row in gad_stream(begun)] == [row[1:] for row in whole[4:]]
    earlier = runs(
        "full", "single", "gad.stage=adversarial", f"warmup_run={warmup}/checkpoints/step-2",
        name="adversarial-from-2",
    )  # fmt: skip
    assert gad_stream(earlier)[0][1] == gad_stream(begun)[0][1]  # the same rows
    assert gad_stream(earlier)[0][6] != gad_stream(begun)[0][6]


def test_seqkd_learns_the_teacher(runs: Runs) -> None:
    run = runs("full", "single", "gad.stage=seqkd", "gad.seqkd_steps=12", "seqkd_lr=0.01", name="seqkd")
    losses = [row[2] for row in gad_stream(run)]
    assert losses[-1] < 0.8 * losses[0]
    assert not (run / "checkpoints/latest/discriminator").exists()


OFTEN_KILLED = {("full", "ddp", 4)}
KILLED = [
    pytest.param(way, engine, at, marks=[] if (way, engine, at) in OFTEN_KILLED else [pytest.mark.slow])
    for way in ("full", "lora")
    for engine in ENGINES
    for at in (2, 4, 6)
]


@pytest.mark.parametrize(("way", "engine", "at"), KILLED)
def test_killed_it_goes_on_bit_for_bit(runs: Runs, tmp_path: Path, way: str, engine: str, at: int) -> None:
    """In the warm-up, in the hand-over and in the adversarial stage: models, optimisers and answers are the same."""
    straight = runs(way, engine)
    nproc, settings = ENGINES[engine]
    path = write_config(tmp_path / "c.yaml", runs.config(way, tmp_path / "run"))
    process = launch(path, "--nproc", str(nproc), *settings)
    wait_for(lambda: (tmp_path / f"run/checkpoints/step-{at}").is_dir(), process)
    kill_all(process)
    run_cli("train", path, "--nproc", nproc, *settings, timeout=600)
    assert gad_stream(tmp_path / "run") == gad_stream(straight)
    files = sorted((straight / "checkpoints/step-8").rglob("*.safetensors"))
    assert len(files) >= 4  # both models, both optimisers
    for file in files:
        other = tmp_path / "run" / file.relative_to(straight)
        assert other.read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_a_stop_in_the_hand_over_saves(runs: Runs, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", runs.config("full", tmp_path / "run"))
    process = launch(path, "engine.name=single")
    wait_for(lambda: (tmp_path / "run/checkpoints/step-4").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    run_cli("train", path, "engine.name=single")
    assert gad_stream(tmp_path / "run") == gad_stream(runs("full", "single"))
