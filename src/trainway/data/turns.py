"""Processes that want the same thing take turns: the first one makes it, those that waited take it as made."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainway.errors import EnvironmentFault
from trainway.files import disk_faults

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""


class Turn:
    """A lock that is held, and in its file the time at which a holder last finished."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def finished_since(self, began: float) -> bool:
        """Whether a holder finished after `began` (time.time()): while we waited, so as well as we would have.

        A time in the future, of another machine's clock, does not count: then the work is done once more.
        """
        self._file.seek(0)
        try:
            return began <= float(self._file.read() or "nan") <= time.time()
        except ValueError:
            return False

    def finish(self) -> None:
        """Note that the work is done, for those who wait."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(repr(time.time()).encode())
        self._file.flush()


@contextmanager
def turn(path: Path, report: Progress | None = None) -> Iterator[Turn]:
    """Hold the lock file `path`, waiting for it. It stays: removing it would let two processes hold a lock each.

    Raises EnvironmentFault when the disk is full or read-only.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below, where the lock ends
    with file:
        _lock(file, path, report)
        yield Turn(file)


def _lock(file: BinaryIO, path: Path, report: Progress | None) -> None:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if report:
                report("waiting for another process that prepares the same data", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise EnvironmentFault(
            f"cannot lock {path}",
            f"the file system has no locks: {os.strerror(error.errno)}",
            "choose a data.store_dir on one that has: a local disk, or a volume mounted with locks",
        ) from error
