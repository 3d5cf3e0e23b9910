"""What the board may look at: plain files below one directory, reached through no link, and the runs that lie there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainway.errors import ConfigError
from trainway.jobs.orders import JobDir
from trainway.run_dir import RunDir

DEPTH = 3
"""How far below the directory runs are looked for."""
MOST_ENTRIES = 20_000
"""Looked at in one search: a directory of a whole disk must not keep the board busy."""
_NEVER = {"checkpoints", "tensorboard", "node_modules", "__pycache__"}
_SIGNS = frozenset(path.name for run in [RunDir(Path())] for path in (run.metrics, run.status, run.lock))
_JOB_SIGNS = frozenset(path.name for job in [JobDir(Path())] for path in (job.orders, job.state))

Signature = tuple[int, int, int]
"""Inode, size and time of change (ns): while it stays, there is nothing new to read."""


@dataclass
class Found:
    """What one search has met with."""

    runs: list[Path] = field(default_factory=list)
    jobs: list[Path] = field(default_factory=list)
    complete: bool = True
    """False when there are more entries than are looked at."""


class Place:
    """One directory and what lies below it."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when it is no directory."""
        self.root = Path(os.path.realpath(directory))
        if not self.root.is_dir():
            raise ConfigError(
                f"there is no directory {directory}",
                "the board shows the runs in a directory",
                "name the one with your runs: `trainway board runs`",
            )

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """A plain file below the directory, for reading.

        Every name on the way is opened for itself and no link is followed, whatever changes meanwhile; nothing waits
        for a pipe. Raises OSError.
        """
        names = self._names(path)
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in names[:-1]:
                inner = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
                )
                os.close(folder)
                folder = inner
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(names[-1], flags, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a plain file")
            yield file

    def read(self, path: Path, most_bytes: int) -> bytes:
        """The beginning of a file. Raises OSError."""
        with self.open(path) as file:
            return file.read(most_bytes)

    def is_reached(self, path: Path) -> bool:
        """Whether no link lies between the directory and `path`, a file or a directory."""
        step = self.root
        for name in self._names(path):
            step = step / name
            try:
                if stat.S_ISLNK(os.lstat(step).st_mode):
                    return False
            except OSError:
                return False
        return True

    def _names(self, path: Path) -> tuple[str, ...]:
        names = path.relative_to(self.root).parts
        assert names and ".." not in names, path
        return names


def signature(path: Path) -> Signature | None:
    """Of a plain file; None for anything else, a link too."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def search(place: Place) -> Found:
    """The run and job directories at or below the place. What cannot be read is passed over."""
    found, left = Found(), MOST_ENTRIES
    todo = [(place.root, 0)]
    while todo:
        folder, depth = todo.pop()
        names: set[str] = set()
        inner: list[Path] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        found.complete = False
                        break
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in _NEVER:
                            inner.append(folder / entry.name)
                    else:
                        names.add(entry.name)
        except OSError:
            continue
        if names & _JOB_SIGNS:
            found.jobs.append(folder)
        elif names & _SIGNS:
            found.runs.append(folder)
            continue
        if depth < DEPTH:
            todo += [(path, depth + 1) for path in sorted(inner, reverse=True)]
    return found
