"""A command ends with the process that started it, and nothing that it has started is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainway.rollout.keeper import Kept

STARTS_ANOTHER = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
print(other.pid, flush=True)
"""


def wait_for(what: str, true: object, deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_close_ends_the_command_and_removes_its_directories(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    log = tmp_path / "log"
    kept = Kept([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
                remove=[folder], log=log)  # fmt: skip
    wait_for("it runs", lambda: log.read_text().strip())
    pid = int(log.read_text())
    assert kept.exit_code() is None and alive(pid)
    kept.close()
    assert not alive(pid) and not folder.exists()
    kept.close()  # twice is as good as once


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    log = tmp_path / "log"
    kept = Kept([sys.executable, "-c", STARTS_ANOTHER + "sys.exit(5)"], remove=[folder], log=log)
    wait_for("it ends", lambda: kept.exit_code() is not None)
    assert kept.exit_code() == 5
    wait_for("what it has started ends", lambda: not alive(int(log.read_text())))
    assert folder.exists()  # a log may lie there
    kept.close()
    assert not folder.exists()


def test_a_command_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kept = Kept([str(tmp_path / "nothing")], remove=[], log=log)
    wait_for("it ends", lambda: kept.exit_code() is not None)
    assert kept.exit_code() == 1 and "FileNotFoundError" in log.read_text()
    kept.close()


@pytest.mark.parametrize("command", [[sys.executable, "-c", STARTS_ANOTHER + "time.sleep(60)"], []])
def test_the_end_comes_when_the_starting_process_is_killed(tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    log = tmp_path / "log"
    code = "import sys, time\nfrom pathlib import Path\nfrom trainway.rollout.keeper import Kept\n"
    code += f"Kept({command!r}, remove=[Path({str(folder)!r})], log=Path({str(log)!r}))\n"
    code += "print('started', flush=True)\ntime.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"started\n"
    if command:
        wait_for("it runs", lambda: log.read_text().strip())
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    wait_for("the directory is gone", lambda: not folder.exists())
    if command:
        assert not alive(int(log.read_text()))
