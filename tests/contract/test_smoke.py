"""The smoke test on two ranks in processes of their own: what is sound passes, what is broken is named."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from tests.conftest import run_cli
from trainway.smoke.report import name_ranks, odd_ones
from trainway.smoke.speed import slow_ranks

CHECKS = "ranks network data gradients weights loss all-reduce matrix_products timing".split()
ENVIRON = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
HOST = socket.gethostname()


class Smoke:
    """A test that runs; `act` is called with rank 1's process when a line begins with `word`."""

    def __init__(
        self, *words: str, at: str = "-", rank: int = 1, act: Callable[[psutil.Process], None] | None = None
    ) -> None:
        command = [sys.executable, "-m", "trainway", "smoke", "--nproc", "2", *words]
        process = subprocess.Popen(
            command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )  # fmt: skip
        self.lines: list[str] = []
        tree: list[psutil.Process] = []
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip())
            if act is not None and self.check_of(line) == at:
                tree = psutil.Process(process.pid).children(recursive=True)
                (victim,) = [child for child in tree if environ(child).get("RANK") == str(rank)]
                act(victim)
                act = None
        self.code = process.wait(60)
        _, self.orphans = psutil.wait_procs(tree, timeout=20)
        for orphan in self.orphans:
            orphan.kill()

    @staticmethod
    def check_of(line: str) -> str:
        found = re.match(r"(?:ok|warn|FAIL) +(all-reduce|matrix products|\w+)", line)
        return found[1] if found else ""

    def line(self, name: str) -> str:
        (found,) = [line for line in self.lines if self.check_of(line) == name]
        return found


def environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        found: dict[str, str] = process.environ()
        return found
    return {}


def test_a_sound_machine_passes() -> None:
    done = run_cli("smoke", "--nproc", 2, "--json", OMP_NUM_THREADS="1")
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert [name.replace(" ", "_") for name in checks] == CHECKS
    assert found["verdict"] == "PASS" and {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert found["settings"] == {
        "epochs": 2, "batch_size": 256, "samples": 4096, "features": 128, "classes": 4, "lr": 0.003, "seed": 42,
        "timeout_s": 60.0, "min_bandwidth": 0.0,
    }  # fmt: skip
    assert [(r["rank"], r["host"], r["device"]) for r in checks["ranks"]["ranks"]] == [
        (rank, HOST, "cpu") for rank in range(2)
    ]
    # the samples are the same on every machine, and so are their digests
    assert checks["data"]["digests"] == PINNED_DIGESTS
    assert checks["loss"]["steps"] == 32
    assert checks["loss"]["first"] == pytest.approx(1.386, abs=0.05)  # ln 4: nothing is known yet
    assert checks["loss"]["last"] < 0.05
    assert checks["gradients"]["error"] < 1e-5
    sizes = checks["all-reduce"]["sizes"]
    assert [row["bytes"] for row in sizes] == [4096 * 4**n for n in range(8)]
    for row in sizes:  # of two ranks: 2 x (2 - 1) / 2
        assert row["bus_gb_s"] == row["algorithm_gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    assert len(checks["matrix products"]["flops"]) == 2 and min(checks["matrix products"]["flops"]) > 1e8
    machine = checks["network"]["machines"][HOST]
    assert machine["interface"] in psutil.net_if_addrs()


PINNED_DIGESTS = ["2b9e621ab6942de8ee1b1bad1e82a4fa", "38bbd472a69e94bec54d7990777384ae"]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_none_is_left(rank: int) -> None:
    smoke = Smoke(
        "--timeout", "5", at="loss", rank=rank, act=lambda victim: victim.send_signal(signal.SIGSTOP)
    )
    assert smoke.code == 4, smoke.lines
    assert f"rank {rank} ({HOST}, pid" in smoke.line("answers") and "stopped (SIGSTOP" in smoke.line(
        "answers"
    )
    assert f"rank {1 - rank}" not in smoke.line("answers")
    assert smoke.lines[-1] == "FAIL"
    assert smoke.orphans == []


@pytest.mark.slow
def test_a_killed_rank_is_named() -> None:
    smoke = Smoke(at="data", act=lambda victim: victim.kill())
    assert smoke.code == 4, smoke.lines
    assert f"rank 1 ({HOST}, pid" in smoke.line("answers") and "ended while the others went on" in smoke.line(
        "answers"
    )
    assert smoke.lines[-1] == "FAIL"
    assert smoke.orphans == []


def test_a_slowed_rank_is_named() -> None:
    with slowing() as slow_down:
        smoke = Smoke(at="loss", act=slow_down)
    assert smoke.code == 4, smoke.lines
    assert f"slow: rank 1 ({HOST})" in smoke.line("matrix products")
    assert "rank 0" not in smoke.line("matrix products")
    assert smoke.lines[-1] == "FAIL"


@contextmanager
def slowing() -> Iterator[Callable[[psutil.Process], None]]:
    """Lets a process run for a fifth of the time, by SIGSTOP and SIGCONT."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def turns(victim: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                victim.suspend()
                time.sleep(0.04)
                victim.resume()
                time.sleep(0.01)

    def begin(victim: psutil.Process) -> None:
        threads.append(threading.Thread(target=turns, args=(victim,)))
        threads[0].start()

    yield begin
    ended.set()
    for thread in threads:
        thread.join()


def under_torchrun(fault: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "tests.smoke_worker", fault],
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("data", f"FAIL  data            rank 1 ({HOST}) holds other data than expected"),
        pytest.param(
            "settings",
            f"FAIL  ranks           rank 1 ({HOST}) has other settings: seed 7 instead of 42",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_with_something_else_is_named_under_an_outside_torchrun(fault: str, line: str) -> None:
    done = under_torchrun(fault)
    assert done.returncode != 0
    lines = done.stdout.splitlines()
    assert line in lines, done.stdout + done.stderr
    # what it computes from them is another gradient, too
    (gradients,) = [line for line in lines if Smoke.check_of(line) == "gradients"]
    assert gradients.startswith(
        f"FAIL  gradients       rank 1 ({HOST}) computes another gradient of the same batch"
    )
    assert lines[-1] == "FAIL"


@pytest.mark.slow
def test_a_loss_that_does_not_fall_and_a_slow_network_fail() -> None:
    done = run_cli("smoke", "--nproc", 2, "--lr", 0, "--min-bandwidth", 1e6, "--epochs", 1, check=4)
    assert "FAIL  loss            did not fall from" in done.stdout
    assert "below --min-bandwidth 1e+06" in done.stdout
    assert done.stdout.splitlines()[-1] == "FAIL"


def test_a_rank_that_does_not_come_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = run_cli("smoke", "--timeout", 2, check=4, **alone)
    assert done.stdout == "FAIL  ranks           of 2 ranks these did not come: 1\nFAIL\n"
    absent = {**alone, "RANK": "1", "LOCAL_RANK": "1"}
    done = run_cli("smoke", "--timeout", 2, check=4, **absent)
    assert f"rank 1 ({HOST}) does not reach rank 0 at 127.0.0.1:{port}" in done.stderr


def test_settings_that_cannot_be_are_refused() -> None:
    done = run_cli("smoke", "--nproc", 2, "--batch-size", 5000, check=2)
    assert "a batch of 5000 rows does not do for 2 ranks and 4096 samples" in done.stderr


def test_the_odd_one_is_the_one_unlike_most() -> None:
    assert odd_ones(["a", "b", "a"]) == [1]
    assert odd_ones(["b", "a", "a"]) == [0]
    assert odd_ones(["a", "b"]) == [1]  # nobody is the majority of two: the first one counts
    assert odd_ones(["a", "a"]) == []
    assert slow_ranks([100.0, 79.0, 99.0, 101.0]) == [1]
    assert slow_ranks([100.0, 81.0]) == [] and slow_ranks([79.0, 100.0]) == [0]
    assert name_ranks([0, 2], ["a", "b", "c"]) == "ranks 0 (a), 2 (c)"
