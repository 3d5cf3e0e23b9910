"""Evaluations kept beside a run: written whole, read back, replaced by newer ones of the same, never stale."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainway.checkpoint.store import CheckpointStore
from trainway.errors import EnvironmentFault
from trainway.run_dir import RunDir
from trainway.training.evaluations import (
    Evaluation,
    checkpoint_identity,
    keep_evaluation,
    newest_figures,
    read_evaluations,
)

HOSTILE = "<script>$(touch x);'\"\n../../x.jsonl"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    store = CheckpointStore(found.checkpoints, keep_last=2)
    for step in (10, 20):
        store.save(step, lambda directory: (directory / "weights").write_text("w"))
    return found


def of(run: RunDir, step: int, date: str = "2026-01-01T00:00:00Z", **what: object) -> Evaluation:
    identity = checkpoint_identity(run.checkpoints / f"step-{step}")
    return Evaluation("a model", str(run.path), step, identity, date, **what)  # type: ignore[arg-type]


def test_read_back(run: RunDir) -> None:
    one = of(
        run,
        10,
        data=(HOSTILE,),
        figures={"val/loss": 1.5, "val/loss_low": None},
        tasks={"arc_easy": {"acc": 0.25, "num_samples": 4}},
        samples=[{"prompt": HOSTILE, "text": "\x1b[31m"}],
        settings={"precision": "fp32"},
    )
    path = keep_evaluation(one)
    assert path is not None
    assert path.parent == run.path / "evaluations"
    assert read_evaluations(run) == [one]
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoints", "evaluations"]


def test_what_is_no_number_is_null(run: RunDir) -> None:
    path = keep_evaluation(of(run, 10, figures={"val/loss": math.nan, "val/ppl": math.inf}))
    assert path is not None
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["figures"] == {"val/loss": None, "val/ppl": None}
    assert newest_figures(read_evaluations(run), 10) == {}


def test_the_same_asked_again_replaces_and_other_things_stay(run: RunDir) -> None:
    for date, loss in (("2026-01-01T00:00:00Z", 2.0), ("2026-01-02T00:00:00Z", 1.0)):
        keep_evaluation(of(run, 10, date, data=("validation",), figures={"val/loss": loss}))
    keep_evaluation(of(run, 10, data=("x.jsonl",), figures={"val/loss": 5.0}))
    keep_evaluation(of(run, 20, data=("validation",), figures={"val/loss": 0.5}))
    found = read_evaluations(run)
    assert len(found) == 3
    assert newest_figures(found, 10) == {"val/loss": 1.0, "x.jsonl/val/loss": 5.0}
    assert newest_figures(found, 20) == {"val/loss": 0.5}


def test_of_weights_that_are_gone_it_does_not_count(run: RunDir) -> None:
    keep_evaluation(of(run, 20, figures={"val/loss": 1.0}))
    store = CheckpointStore(run.checkpoints, keep_last=2)
    store.discard_after(10)
    assert len(read_evaluations(run)) == 1  # nothing contradicts it
    store.save(20, lambda directory: (directory / "weights").write_text("others"))
    assert read_evaluations(run) == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 1}', '{"format": 2, "model": "x"}', '{"format": 1, "da']
)
def test_a_file_of_another_form_is_left_out(run: RunDir, content: str) -> None:
    keep_evaluation(of(run, 10, figures={"val/loss": 1.0}))
    (run.evaluations / "step-10-loss-0.json").write_text(content)
    assert [one.figures["val/loss"] for one in read_evaluations(run)] == [1.0]


def test_a_model_of_no_run_is_kept_nowhere() -> None:
    assert keep_evaluation(Evaluation("gpt2", None, None, None, "2026-01-01T00:00:00Z")) is None


def test_a_full_disk_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentFault, match="cannot write"):
        keep_evaluation(of(run, 10))
    assert list(run.evaluations.iterdir()) == []
