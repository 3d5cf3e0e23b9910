"""One launch at a time: the lock, its holder, and what a dead holder leaves."""

import json
import os
import signal
import subprocess
import sys

import pytest

from trainway.checkpoint.lock import lock_holder, run_lock
from trainway.errors import EnvironmentFault
from trainway.run_dir import RunDir

HOLD = """
import os
import sys
import time
from pathlib import Path
from trainway.checkpoint.lock import run_lock
from trainway.run_dir import RunDir
with run_lock(RunDir(Path(sys.argv[1]))):
    if "fork" in sys.argv and os.fork() == 0:
        print(os.getpid(), flush=True)  # from the worker: it is up, and has had its chance to drop the lock
        time.sleep(60)
    if "fork" not in sys.argv:
        print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def hold(run_dir):
    """Start a process that holds the lock; returns it and what it printed."""
    started = []

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run_dir.path), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_held_and_released(run_dir):
    assert lock_holder(run_dir) is None
    with run_lock(run_dir):
        holder = lock_holder(run_dir)
        assert holder is not None and holder["pid"] == os.getpid() and holder["host"] and holder["time"]
        with pytest.raises(EnvironmentFault, match="in use"), run_lock(run_dir):
            pass
        assert lock_holder(run_dir) is not None
    assert lock_holder(run_dir) is None
    with run_lock(run_dir):
        pass


def test_a_second_process_is_refused(run_dir, hold):
    process, _ = hold()
    with pytest.raises(EnvironmentFault, match="in use") as caught, run_lock(run_dir):
        pass
    assert f"process {process.pid} on host {os.uname().nodename}" in caught.value.why
    holder = lock_holder(run_dir)
    assert holder is not None and holder["pid"] == process.pid


def test_kill_9_frees_the_lock(run_dir, hold):
    process, _ = hold()
    process.kill()
    process.wait()
    assert json.loads(run_dir.lock.read_text())["pid"] == process.pid  # stale, and harmless
    assert lock_holder(run_dir) is None
    with run_lock(run_dir):
        holder = lock_holder(run_dir)
        assert holder is not None and holder["pid"] == os.getpid()


def test_a_forked_worker_does_not_keep_it(run_dir, hold):
    process, child = hold("fork")
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # the worker lives on
        assert lock_holder(run_dir) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_started_program_does_not_inherit_it(run_dir):
    with run_lock(run_dir):
        # close_fds=False: only close-on-exec keeps it from the program
        program = subprocess.Popen(
            [sys.executable, "-c", "print(1, flush=True); input()"],
            close_fds=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert program.stdout is not None
        program.stdout.readline()
    assert lock_holder(run_dir) is None
    program.communicate(b"\n")


def test_garbage_in_the_file_is_no_obstacle(run_dir):
    run_dir.path.mkdir()
    run_dir.lock.write_bytes(b"\xff garbage")
    assert lock_holder(run_dir) is None
    with run_lock(run_dir):
        assert json.loads(run_dir.lock.read_text())["pid"] == os.getpid()
        run_dir.lock.write_bytes(b"[]")
        assert lock_holder(run_dir) == {"pid": None, "host": None, "time": None}


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(EnvironmentFault, match="cannot be written"),
        run_lock(RunDir(tmp_path / "file" / "run")),
    ):
        pass
