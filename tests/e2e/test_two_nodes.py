"""Two nodes as an Indexed Job of Kubernetes starts them, on one volume: they train, are asked to end, save, and go on."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.e2e.test_pod import Pod, pod, until
from trainway.jobs.orders import PodState
from trainway.pod.processes import JOB_MARK, find_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def start(job: Pod) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [job.start(rank, JOB_COMPLETION_INDEX=str(rank), **said) for rank in range(2)]


def states(job: Pod) -> list[PodState]:
    return [PodState.model_validate_json(job.dir.node(rank).state.read_text()) for rank in range(2)]


def test_two_nodes_save_when_asked_to_end_and_finish_when_started_again(tmp_path: Path, corpus: Path) -> None:
    more = {"nodes": 2, "processes": 1, "engine": {"name": "ddp"}, "release": {"to": "exports/final"}}
    job = pod(tmp_path, corpus, steps=400, **more)
    nodes = start(job)
    until(lambda: max(job.steps, default=0) > 2, *nodes)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(600) for node in nodes] == [75, 75], job.dir.log.read_text()
    saved = job.state.saved_step
    assert 2 < saved < 400
    assert [state.outcome for state in states(job)] == ["stopped", "stopped"]

    nodes = start(job)
    assert [node.wait(1200) for node in nodes] == [0, 0], job.dir.log.read_text()
    assert f"(step {saved} of 400)" in job.dir.log.read_text()
    assert job.steps[-1] == 400
    assert [state.outcome for state in states(job)] == ["done", "done"]
    # the first node alone releases
    assert "export" in job.dir.log.read_text()
    assert "export" not in job.dir.node(1).log.read_text()
    assert (tmp_path / "exports" / "final" / "config.json").exists()
    assert not find_all(lambda environ: environ.get(JOB_MARK, "").startswith(str(tmp_path)))
