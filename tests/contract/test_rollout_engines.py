"""Under every engine the student answers as on one process, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import launch_ranks, once, shared
from tests.rollout_worker import STEPS, Job, requests

CASES: dict[str, dict[str, Any]] = {name: {"engine": name} for name in ("ddp", "fsdp", "zero2", "zero3")}
"""What runs on two ranks, with answers between the steps and without."""
VARIANTS: dict[str, dict[str, Any]] = {
    "fsdp-offload": {"engine": "fsdp", "offload": "all"},
    "fsdp-experts": {"engine": "fsdp", "family": "qwen3-moe"},
    "fsdp-continuous": {"engine": "fsdp", "rollouts": "continuous"},
    "zero3-offload": {"engine": "zero3", "offload": "all"},
    "zero3-continuous": {"engine": "zero3", "rollouts": "continuous"},
    "hybrid": {"engine": "fsdp", "sharding": "hybrid"},
    "fsdp-bf16": {"engine": "fsdp", "precision": "bf16"},
    "zero3-bf16": {"engine": "zero3", "precision": "bf16"},
}
ALONE = {"llama": "single", "qwen3-moe": "single-experts"}
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
EXACT = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if "bf16" not in name)]


def launch(jobs: list[Job], nproc: int) -> None:
    """Run jobs on `nproc` ranks."""
    for job in jobs:
        Path(job.out).mkdir(parents=True)
    launch_ranks("tests.rollout_worker", jobs, nproc)


class Runs:
    """The cases on two ranks and each family on one process, made when one of them is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, case: str) -> Path:
        """Where the run `case` is; without answers it is called `case`-quiet."""
        name = case.removesuffix("-quiet")
        if name in ALONE.values():
            return once(self._root / "alone", self._alone) / case
        kind, cases = ("cases", CASES) if name in CASES else ("variants", VARIANTS)
        return once(self._root / kind, lambda: self._together(self._root / kind, cases)) / case

    def _alone(self) -> None:
        alone = self._root / "alone"
        jobs = [Job(str(alone / name), "single", "static", family) for family, name in ALONE.items()]
        launch([*jobs, Job(str(alone / "single-quiet"), "single")], 1)

    def _together(self, root: Path, cases: dict[str, dict[str, Any]]) -> None:
        jobs = [
            Job(str(root / f"{name}{suffix}"), **{"rollouts": "static", **case, **more})
            for name, case in cases.items()
            for suffix, more in (("", {}), ("-quiet", {"rollouts": ""}))
        ]
        launch(jobs, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared(tmp_path_factory, "rollout-engines"))


def records(root: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"records-{rank}.json").read_text())
    return found


def reference(runs: Runs, case: str) -> dict[str, Any]:
    return records(runs(ALONE[(CASES | VARIANTS)[case].get("family", "llama")]))


@pytest.mark.parametrize("case", EXACT)
def test_answers_are_those_of_one_process(runs: Runs, case: str) -> None:
    """Each rank answers requests of its own, of other lengths and number; one of them may have none."""
    expected = reference(runs, case)["answers"]
    ranks = [records(runs(case), rank)["answers"] for rank in range(2)]
    assert len(expected) == STEPS + 1 and expected[0] != expected[1] != expected[2] != expected[3]
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        assert len(first) + len(second) == len(requests())
        assert first | second == expected[step]


@pytest.mark.parametrize("case", EVERY)
def test_training_is_the_same_without_them(runs: Runs, case: str) -> None:
    for rank in range(2):
        loud, quiet = (records(runs(name), rank) for name in (case, f"{case}-quiet"))
        assert loud["steps"] == quiet["steps"] and len(loud["steps"]) == STEPS  # as hex: bit for bit
        assert loud["weights"] == quiet["weights"]


@pytest.mark.parametrize("case", EXACT)
def test_training_is_that_of_one_process(runs: Runs, case: str) -> None:
    for own, other in zip(records(runs(case))["steps"], reference(runs, case)["steps"], strict=True):
        numbers = [float.fromhex(value) for value in other]
        assert [float.fromhex(value) for value in own] == pytest.approx(numbers, rel=1e-5)


def test_one_process_does_not_notice_either(runs: Runs) -> None:
    loud, quiet = records(runs("single")), records(runs("single-quiet"))
    assert loud["steps"] == quiet["steps"]
    assert loud["weights"] == quiet["weights"]
