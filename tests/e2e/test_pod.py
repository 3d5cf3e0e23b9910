"""`python -m trainway.pod` takes a real run from its orders to a model: checks, training, a kill, a stop, the export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import metrics, tiny
from trainway.jobs.orders import JobDir, Orders, PodState
from trainway.pod.processes import JOB_MARK, find_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Pod:
    """A job on a volume of its own."""

    def __init__(self, root: Path, config: dict[str, Any], **more: Any) -> None:
        values = {
            "job": "try",
            "config": config,
            "root": str(root),
            "limits": {"hours": 2},
            "guard_every_s": 0.5,
        }
        self.orders = Orders.model_validate({**values, **more})
        self.root, self.dir = root, JobDir.of(root, "try")
        self.file = root / "orders.json"
        self.file.write_text(self.orders.model_dump_json())

    def start(self, rank: int = 0, **environ: str) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environ,
        }
        command = [sys.executable, "-m", "trainway.pod", str(self.file)]
        with (self.root / f"out-{rank}.txt").open("ab") as out:
            return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)

    def run(self, code: int) -> None:
        process = self.start()
        try:
            assert process.wait(900) == code, self.dir.log.read_text()
        finally:
            process.kill()

    @property
    def state(self) -> PodState:
        return PodState.model_validate_json(self.dir.state.read_text())

    @property
    def steps(self) -> list[int]:
        run = self.root / "runs" / "try"
        return [int(str(r["step"])) for r in metrics(run)] if (run / "metrics.jsonl").exists() else []


def pod(root: Path, corpus: Path, steps: int = 20, engine: dict[str, Any] | None = None, **more: Any) -> Pod:
    config = tiny(corpus, Path("cache/try"), Path("runs/try"), total_steps=steps)
    config["eval"] = {"every": 1000, "num_samples": 0}
    return Pod(root, {**config, "engine": engine or {}}, **more)


def until(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "timed out"
        assert all(process.poll() is None for process in processes), "it is over already"
        time.sleep(0.01)


def training_of(pod: Pod) -> psutil.Process:
    found = find_all(lambda environ: environ.get(JOB_MARK) == str(pod.dir.path))
    (training,) = [process for process in found if "train" in process.cmdline()[:4]]
    return training


def test_a_run_is_killed_stopped_and_finished(tmp_path: Path, corpus: Path) -> None:
    job = pod(tmp_path, corpus, steps=2000, release={"to": "exports/final"})
    process = job.start()
    until(lambda: max(job.steps, default=0) > 12, process)
    training_of(job).kill()
    until(lambda: (job.state.attempts, job.state.stage) == (2, "train") and max(job.steps) > 25, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    stopped = job.state
    assert (stopped.outcome, stopped.total_steps) == ("stopped", 2000)
    assert stopped.saved_step > 20
    assert f"step {stopped.saved_step} is saved" in stopped.reason
    assert not find_all(lambda environ: environ.get(JOB_MARK) == str(job.dir.path))

    process = job.start()
    until(lambda: max(job.steps) > stopped.saved_step + 5, process)
    log = job.dir.log.read_text()
    assert f"(step {stopped.saved_step} of 2000)" in log
    assert "exit code 137; it goes on from step" in log
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    assert job.state.began == stopped.began


def test_a_run_that_is_done_is_released_and_never_trained_again(tmp_path: Path, corpus: Path) -> None:
    job = pod(tmp_path, corpus, release={"to": "exports/final"})
    job.run(0)
    state = job.state
    assert (state.outcome, state.step, state.saved_step, state.incomplete) == ("done", 20, 20, False)
    assert (tmp_path / "exports" / "final" / "model.safetensors").exists()
    assert json.loads((tmp_path / "runs" / "try" / "status.json").read_text())["state"] == "done"
    log = job.dir.log.read_text()
    assert (tmp_path / "out-0.txt").read_text() == log
    job.run(0)
    assert job.state.began == state.began
    assert job.dir.log.read_text().removeprefix(log).count("\n") == 1


def test_missing_data_ends_the_job_before_the_training(tmp_path: Path) -> None:
    job = pod(tmp_path, tmp_path / "nowhere.jsonl")
    job.run(4)
    assert (job.state.stage, job.state.outcome, job.state.attempts) == ("ended", "failed", 0)
    assert "nowhere.jsonl" in job.dir.log.read_text()


def test_a_training_that_is_stopped_by_the_kernel_does_not_cost_for_ever(
    tmp_path: Path, corpus: Path
) -> None:
    job = pod(tmp_path, corpus, steps=5000, limits={"hours": 2, "stall_minutes": 0.5})
    process = job.start()
    until(lambda: max(job.steps, default=0) > 2, process)
    training_of(job).suspend()
    assert process.wait(300) == 4
    assert job.state.outcome == "stalled"
    assert not find_all(lambda environ: environ.get(JOB_MARK) == str(job.dir.path))


def test_a_machine_that_is_lost_with_its_disk_is_replaced_by_another(tmp_path: Path, corpus: Path) -> None:
    """Both copy to one place outside; the second has nothing but that, and goes on from there."""
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second):
        root.mkdir()
    outside = {"sync": str(tmp_path / "outside")}
    lost = pod(first, corpus, steps=2000, **outside)
    process = lost.start()
    until(lambda: max(lost.steps, default=0) > 12, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    saved = lost.state.saved_step
    shutil.rmtree(first)

    heir = pod(second, corpus, steps=2000, **outside)
    process = heir.start()
    until(lambda: max(heir.steps, default=0) > saved + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    log = heir.dir.log.read_text()
    assert f"the run goes on from step {saved}" in log
    assert heir.steps == list(range(1, heir.steps[-1] + 1))
