"""The processes of a stage: started in a session of their own, asked to end, and found wherever they have gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

JOB_MARK = "TRAINWAY_JOB_DIR"
"""Environment of every process of a stage: the directory of the job on its node."""
STAGE_MARK = "TRAINWAY_STAGE"
"""The same: which start of which stage it belongs to."""
KILL_S = 30.0
"""How long killed processes may take to be gone; what the kernel does not give back by then is left behind."""


class Child:
    """One stage: its command, and all that it starts."""

    def __init__(
        self, command: Sequence[str], *, job_dir: Path, log: Path, folder: Path, environ: Mapping[str, str]
    ) -> None:
        self._mark = uuid.uuid4().hex
        marks = {JOB_MARK: str(job_dir), STAGE_MARK: self._mark, "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, "-m", "trainway.pod.child", str(os.getpid()), *command]
        # The log is written by the stage itself: it loses nothing when this process dies or hangs.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                words, cwd=folder, env={**environ, **marks}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def exit_code(self) -> int | None:
        """None while it runs; of a process that a signal has ended 128 and its number."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def ask_to_end(self) -> None:
        """SIGTERM to the command, which passes it on to its ranks."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> bool:
        """SIGKILL to all that the stage has started; whether they are gone."""
        gone = kill_all(lambda environ: environ.get(STAGE_MARK) == self._mark)
        with suppress(subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(KILL_S)
        return gone and self._process.poll() is not None


def find_all(belongs: Callable[[Mapping[str, str]], bool]) -> list[psutil.Process]:
    """The living processes, but this one, whose environment at their start satisfies `belongs`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and belongs(process.environ()):
                found.append(process)
    return found


def kill_all(belongs: Callable[[Mapping[str, str]], bool]) -> bool:
    """SIGKILL every such process until none is left; False when some are still there after `KILL_S`."""
    end = time.monotonic() + KILL_S
    while found := find_all(belongs):
        if time.monotonic() > end:
            return False
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)
    return True


def end_all(belongs: Callable[[Mapping[str, str]], bool], grace_s: float) -> bool:
    """SIGTERM to those of them that no other of them has started, which pass it on; SIGKILL to those that are left after
    `grace_s`. Returns whether all are gone."""
    found = find_all(belongs)
    ids = {process.pid for process in found}
    for process in found:
        with suppress(psutil.Error):
            if process.ppid() not in ids:
                process.send_signal(signal.SIGTERM)
    end = time.monotonic() + grace_s
    while find_all(belongs):
        if time.monotonic() > end:
            return kill_all(belongs)
        time.sleep(0.1)
    return True
