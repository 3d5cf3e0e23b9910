"""A discriminator learns under every engine as on one process, alone and beside a student, and goes on from any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.base_models import save, tiny_model
from tests.conftest import launch_ranks, once, shared
from tests.discriminator_worker import SEEN, STEPS, Job, main
from trainway.checkpoint.weights import is_in_pieces, read_model_state

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
WAYS: dict[str, dict[str, Any]] = {
    "beside-a-student": {"student": True},
    "padded": {"packed": False},
    "lora": {"lora": True},
    "lora-beside-a-student": {"lora": True, "student": True, "packed": False},
}
OFTEN = ("beside-a-student", "lora")
"""What the default suite holds every engine to."""
SELDOM = tuple(way for way in WAYS if way not in OFTEN)
SHARDED = ("fsdp", "zero2", "zero3")


def launch(jobs: list[Job]) -> None:
    """Run jobs on two ranks."""
    launch_ranks("tests.discriminator_worker", jobs, 2)


class Runs:
    """Every engine's run of some ways, from the start and from the middle of another's."""

    def __init__(self, root: Path, ways: tuple[str, ...]) -> None:
        self.root, self.ways = root, ways
        once(root / "runs", self._run_all)

    def __call__(self, name: str, way: str) -> Path:
        return self.root / "runs" / name / way

    def _run_all(self) -> None:
        base = save(tiny_model("llama"), self.root / "base")

        def job(name: str, way: str, engine: str, **more: Any) -> Job:
            return Job(str(self(name, way)), str(base), engine, **{**WAYS[way], **more})

        jobs = [job("single", way, "single") for way in self.ways]
        main([*jobs, job("single-bf16", "lora", "single", precision="bf16")])
        jobs = [job(engine, way, engine) for engine in ENGINES for way in self.ways]
        # zero3 last: from its first model on, it has a hand in every linear layer of the process
        jobs += [job("fsdp-bf16", "lora", "fsdp", precision="bf16")]
        jobs += [job("zero2-bf16", "lora", "zero2", precision="bf16")]
        for engine in ENGINES:
            start = self._middle("single", "lora")
            jobs.append(job(f"{engine}-after-single", "lora", engine, start=start))
        jobs.sort(key=lambda job: (*ENGINES, "single").index(job.engine))
        launch(jobs)
        jobs = [
            job(f"single-after-{engine}", way, "single", start=self._middle(engine, way), student=False)
            for engine in ENGINES
            for way in self.ways
        ]
        main(jobs)

    def _middle(self, name: str, way: str) -> str:
        return str(self.directory(name, way, "middle"))

    def directory(self, name: str, way: str, when: str = "end") -> Path:
        """Where a run's discriminator is."""
        beside = WAYS[way].get("student") and "-after-" not in name
        return self(name, way) / when / ("discriminator" if beside else "")


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared(tmp_path_factory, "discriminator-engines"), OFTEN)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared(tmp_path_factory, "discriminator-engines-rest"), ("lora", *SELDOM))


def seen(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / SEEN).read_text())
    return found


def assert_same(first: Path, second: Path) -> None:
    a, b = (read_model_state(directory / "model") for directory in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == torch.float32
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


def assert_learns_alike(runs: Runs, way: str, engine: str) -> None:
    single, other = (seen(runs(name, way))["records"] for name in ("single", engine))
    assert len(single) == len(other) == STEPS
    for ours, theirs in zip(single, other, strict=True):
        assert theirs[:2] == pytest.approx(ours[:2], rel=1e-5)
        assert theirs[2:] == pytest.approx(ours[2:], abs=1e-5)
    assert_same(runs.directory("single", way), runs.directory(engine, way))
    assert is_in_pieces(runs.directory(engine, way) / "model") == (engine in SHARDED)
    if WAYS[way].get("student"):
        assert_same(runs("single", way) / "end", runs(engine, way) / "end")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", OFTEN)
def test_a_discriminator_learns_as_on_one_process(often: Runs, way: str, engine: str) -> None:
    assert_learns_alike(often, way, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", SELDOM)
def test_so_it_does_in_other_ways(rest: Runs, way: str, engine: str) -> None:
    assert_learns_alike(rest, way, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_goes_on_under_another_engine(often: Runs, engine: str) -> None:
    for way in OFTEN:
        ended = often.directory("single", way)
        assert_same(ended, often.directory(f"single-after-{engine}", way))
    assert_same(ended, often.directory(f"{engine}-after-single", "lora"))


@pytest.mark.slow
def test_packed_and_padded_rows_teach_the_same(rest: Runs, often: Runs) -> None:
    assert_same(often.directory("single", "beside-a-student"), rest.directory("single", "padded"))


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_in_bf16_scores_are_fp32(often: Runs, engine: str) -> None:
    """The head lies outside FSDP's blocks and stays fp32; DeepSpeed's copy of it is bf16, and its products are not."""
    single, other = (seen(often(f"{name}-bf16", "lora")) for name in ("single", engine))
    assert other["head"] == (["torch.float32"] if engine == "fsdp" else ["torch.bfloat16"])
    for (ours, _, *our_scores), (theirs, _, *their_scores) in zip(
        single["records"], other["records"], strict=True
    ):
        assert theirs == pytest.approx(ours, rel=5e-2)
        for scores in (our_scores, their_scores):
            rounded = torch.tensor(scores).bfloat16().float()
            assert not torch.equal(rounded, torch.tensor(scores))
    state = read_model_state(often.directory(f"{engine}-bf16", "lora") / "model")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
