"""What the supervisor says and knows, on the volume: the log, the state, and a copy of the log on standard output."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from trainway.errors import EnvironmentFault
from trainway.files import atomic_write
from trainway.jobs.orders import JobDir, PodState

BEAT_S = 60.0
"""The state is written at least so often."""
_COPY_EVERY_S = 0.1
_MOST_LINES = 1000
"""Of those that the disk has not taken; the newest are kept."""
_STDOUT = 1


class Clock:
    """Seconds since 1970 that never jump: the machine's clock at the start, and its steady one from there."""

    def __init__(self) -> None:
        self._start = time.time() - time.monotonic()

    def now(self) -> float:
        return self._start + time.monotonic()


class Journal:
    """The log and the state of one supervisor. A disk that is full or gone never keeps it from going on."""

    def __init__(self, job_dir: JobDir, state: PodState, clock: Clock) -> None:
        self.job_dir, self.state, self._clock = job_dir, state, clock
        self._file = os.open(job_dir.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._written = -BEAT_S
        self._copy = _Copy(job_dir)

    def say(self, text: str) -> None:
        """One line, with its time in UTC, to the log."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock.now()))
        line = f"[JOB] {moment} {' '.join(text.split())}\n".encode("utf-8", "backslashreplace")
        try:
            written = os.write(self._file, line)
        except OSError:
            written = 0
        if written < len(line):  # a disk that is full takes a part of it, or nothing
            self._copy.add(line[written:])

    def change(self, **changes: Any) -> None:
        """Note something new."""
        self.state = self.state.model_copy(update={**changes, "updated": self._clock.now()})
        self._written = time.monotonic()
        try:
            atomic_write(self.job_dir.state, json.dumps(self.state.model_dump(), indent=1) + "\n")
        except (EnvironmentFault, OSError) as error:
            self.say(f"the state cannot be written: {error}")

    def beat(self, **changes: Any) -> None:
        """As `change`, when there is something new or the last time was a minute ago."""
        new = any(getattr(self.state, name) != value for name, value in changes.items() if name != "dollars")
        if new or time.monotonic() - self._written >= BEAT_S:
            self.change(**changes)

    def close(self) -> None:
        """Let the copy on standard output come to its end."""
        self._copy.end()
        os.close(self._file)


class _Copy:
    """Copies the log to standard output as it grows, in a thread: whoever reads there may be slow, or hang."""

    def __init__(self, job_dir: JobDir) -> None:
        self._log = open(job_dir.log, "rb", buffering=0)  # noqa: SIM115 - the thread closes it
        self._log.seek(0, os.SEEK_END)
        self._more: deque[bytes] = deque(maxlen=_MOST_LINES)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def add(self, data: bytes) -> None:
        """Copy what the log does not hold; never waits for the reader."""
        self._more.append(data)

    def end(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        with self._log, suppress(OSError):
            while True:
                last = self._ended.is_set()  # before reading: what was said until then is copied
                while data := self._log.read(1 << 16):
                    _write(data)
                while self._more:
                    _write(self._more.popleft())
                if last:
                    return
                self._ended.wait(_COPY_EVERY_S)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]
