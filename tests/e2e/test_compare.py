"""`trainway compare` as a user meets it: two recipes in one table, JSON for a script, exit codes, a quick start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.unit.report.test_compare import FIGURES, write_run
from trainway.gad.samples import Sample, write_samples


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A pretraining run and a distillation of one checkpoint, beside each other."""
    write_run(tmp_path / "base", [{"step": 10, "val/loss": 3.25, "val/ppl": 25.79}], {10: True})
    distilled = write_run(
        tmp_path / "distilled",
        [{"step": 0, **FIGURES}, {"step": 5, "gad/stage": "seqkd", **FIGURES}],
        {5: True},
    )
    write_samples(distilled / "samples.jsonl", [Sample(5, "Say hi", "Hello!", "Hi.", 0.5, 0.25, False)])
    return tmp_path


def test_runs_side_by_side(runs: Path) -> None:
    shown = run_cli("compare", runs / "base", runs / "distilled", "--samples", "2")
    assert shown.stderr == ""
    table, samples = shown.stdout.split("\n\n")
    head, *rows = table.splitlines()
    assert head.split()[:4] == ["run", "step", "stage", "marks"]
    assert [row.split()[:5] for row in rows] == [
        ["base", "10", "latest", "best", "3.2500"],
        ["distilled", "0", "1.5000", "0.3126", "412.0"],
        ["distilled", "5", "seqkd", "latest", "best"],
    ]
    assert samples == "> Say hi\n[teacher]\nHello!\n[step 5 (score 0.500)]\nHi.\n".replace(
        "step 5", "distilled step 5"
    )


def test_a_script_finds_the_best_checkpoint(runs: Path) -> None:
    rows = json.loads(run_cli("compare", runs / "base", runs / "distilled", "--json").stdout)["rows"]
    best = max(rows, key=lambda row: row["figures"].get("val/rouge_l", 0.0) if row["saved"] else 0.0)
    assert (best["run"], best["step"]) == ("distilled", 5)
    assert Path(best["path"], "checkpoints", f"step-{best['step']}", "weights").exists()


def test_what_is_not_there_is_code_2(runs: Path) -> None:
    done = run_cli("compare", runs / "base", runs / "nothing", check=2)
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "why", "fix"]
