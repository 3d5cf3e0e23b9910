"""A run that stands still is ended: the rank it waits for is named, no process is left, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import kill_all, launch, metrics, run_cli, tiny, wait_for, write_config
from tests.watchdog_worker import STUCK_AT

STEPS = 80
HOST = socket.gethostname()


def config_file(root: Path, corpus: Path, store_dir: Path) -> Path:
    config = tiny(corpus, store_dir, root / "run", total_steps=STEPS)
    config["checkpoint"] = {"save_every": 7, "keep_last": 2}
    config["eval"] = {"every": 1000, "num_samples": 0}
    config["watchdog"] = {"stall_s": 8}
    return write_config(root / "config.yaml", config)


def break_rank(root: Path, config: Path, rank: int, act: Callable[[psutil.Process], None]) -> tuple[int, str]:
    """Train on two ranks, and do something to one of them after ten steps; the exit code and what was said.

    No process of the run may be left.
    """
    process = launch(config, "--nproc", "2", OMP_NUM_THREADS="1")
    lines = root / "run/metrics.jsonl"
    try:
        wait_for(lambda: lines.exists() and lines.read_bytes().count(b'"samples"') >= 10, process, 240)
    except AssertionError:
        kill_all(process)
        raise
    tree = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in tree if environ(child).get("RANK") == str(rank)]
    act(victim)
    code = process.wait(120)
    _, left = psutil.wait_procs(tree, timeout=20)
    for orphan in left:
        orphan.kill()
    assert left == []
    return code, (config.parent / "launch.log").read_text()


def environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        found: dict[str, str] = process.environ()
        return found
    return {}


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_run_goes_on_afterwards(
    tmp_path: Path, corpus: Path, store_dir: Path, rank: int
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    code, said = break_rank(tmp_path, config, rank, lambda victim: victim.send_signal(signal.SIGSTOP))
    assert code == 4, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: rank {rank} ({HOST}, pid ") and "does not answer" in error
    assert "its process is stopped (SIGSTOP" in said and "Traceback" not in said
    run = tmp_path / "run"
    assert error in (run / "log.txt").read_text().replace("ERROR ", "")
    # the one that lived says where it waited; the stopped one could not
    assert "in fit" in (run / f"stacks-rank-{1 - rank}.txt").read_text()
    assert not (run / f"stacks-rank-{rank}.txt").exists()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and f"rank {rank}" in status["error"]
    run_cli("train", config, "--nproc", 2, OMP_NUM_THREADS="1")
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_data_that_do_not_come_are_named_with_the_call_that_waits(
    tmp_path: Path, corpus: Path, store_dir: Path, nproc: int
) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command = [
        sys.executable,
        *(torchrun if nproc > 1 else []),
        "-m",
        "tests.watchdog_worker",
        str(fifo),
        str(config),
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == (1 if nproc > 1 else 4), done.stderr  # torchrun knows one code
    lines = done.stderr.splitlines()
    (what,) = [line for line in lines if line.startswith("error:")]
    (why,) = [line for line in lines if line.startswith("why:")]
    where = f"in data of step {STUCK_AT} for "
    if nproc > 1:
        assert what.startswith(f"error: rank 1 ({HOST}, pid ") and f"is {where}" in what
        assert what.endswith(" s, and the others wait for it")
    else:
        assert what.startswith(f"error: the run does not get on: {where}")
    assert (
        "tests/watchdog_worker.py:" in why and "read_from_a_dead_disk, called from training/loop.py:" in why
    )
    assert "see that its data lie on a disk that answers" in done.stderr
    stacks = (tmp_path / f"run/stacks-rank-{nproc - 1}.txt").read_text()
    assert "in read_from_a_dead_disk" in stacks


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_in_time(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = config_file(tmp_path, corpus, store_dir)
    code, said = break_rank(tmp_path, config, 1, lambda victim: victim.kill())
    assert code == 4, said  # what kills a process is most often a machine whose memory is full
    # whoever notices first: the other rank, or torchrun, which then ends that one before it can speak
    named = rf"rank 1 \({HOST}, pid \d+\).* ended while the others went on|rank 1 was ended by SIGKILL"
    assert re.search(named, said), said
    assert "error: a process of the run was killed from outside (SIGKILL)" in said
    run_cli("train", config, "--nproc", 2, OMP_NUM_THREADS="1")
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
