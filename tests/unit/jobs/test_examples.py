"""The example job files: each is a job that would be taken, with limits, and is told of in docs/launch.md."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainway.jobs
from trainway.jobs.load import load_job
from trainway.planning.gpus import find_gpu
from trainway.planning.prices import load_prices

ROOT = Path(__file__).parent.parent.parent.parent
EXAMPLES = sorted((Path(trainway.jobs.__file__).parent / "examples").glob("*.yaml"))


def test_there_is_one_for_each_target() -> None:
    assert {load_job(path).spec.target for path in EXAMPLES} == {"local", "ssh", "runpod", "kubernetes"}
    assert len({load_job(path).spec.name for path in EXAMPLES}) == len(EXAMPLES) == 7


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_a_job_within_limits(path: Path) -> None:
    job = load_job(path)
    assert job.spec.limits.hours is not None
    assert job.config.run_dir == f"runs/{job.spec.name}"
    for gpu in job.spec.gpus:
        find_gpu(gpu.name)
    if job.spec.target in ("runpod", "kubernetes"):
        assert job.spec.limits.dollars is not None
        assert job.spec.volume.id or job.spec.volume.size_gb, "what is trained outlives the machine"
        assert job.spec.at_end.machine == "terminate"
        if job.spec.target == "runpod":  # the catalogue says them: one in the file would be a guess
            assert not any(gpu.max_price or gpu.price for gpu in job.spec.gpus)
        listed = [load_prices().of(find_gpu(gpu.name)) for gpu in job.spec.gpus]
        price = max(gpu.price or found.usd_per_hour for gpu, found in zip(job.spec.gpus, listed, strict=True))
        most = price * job.spec.gpus[0].count * job.spec.nodes * job.spec.limits.hours
        assert job.spec.limits.dollars <= most * 1.05, "the limit in dollars is one"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_guide_tells_of_it(path: Path) -> None:
    assert f"src/trainway/jobs/examples/{path.name}" in (ROOT / "docs" / "launch.md").read_text()
