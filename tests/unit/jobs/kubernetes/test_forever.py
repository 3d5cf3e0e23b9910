"""In a StatefulSet what is over sleeps, what is not is started again, and SIGTERM ends both."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

RUN = "import sys; from trainway.jobs.kubernetes.forever import main; sys.exit(main(sys.argv[1:]))"


def start(*program: str) -> subprocess.Popen[str]:
    command: Sequence[str] = (sys.executable, "-c", RUN, sys.executable, "-c", *program)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_what_is_over_sleeps_until_it_is_ended(code: int) -> None:
    with start(f"raise SystemExit({code})") as process:
        assert process.stdout is not None
        assert f"ended with exit code {code}: this pod sleeps" in process.stdout.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(1)", 1), ("import os; os.kill(os.getpid(), 9)", 137)])  # fmt: skip
def test_what_crashed_ends_and_is_started_again(program: str, code: int) -> None:
    with start(program) as process:
        assert process.wait(60) == code


def test_the_signal_reaches_the_run_which_saves() -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    with start(program) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
