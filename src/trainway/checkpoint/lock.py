"""The lock that keeps a second launch out of a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainway.errors import EnvironmentFault
from trainway.run_dir import RunDir

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the run directory for this process, creating it if needed.

    Raises EnvironmentFault if another process holds it, or if the file system cannot lock.
    """
    with directory_lock(run_dir.path, run_dir.lock, what="run", setting="run_dir"):
        yield


@contextmanager
def directory_lock(folder: Path, lock: Path, *, what: str, setting: str) -> Iterator[None]:
    """Hold `folder` for this process through the file `lock` in it, creating both if needed.

    The kernel drops the lock when the process ends, however it ends, so what a dead holder left is taken over.
    what, setting: what the directory is and which setting names it, for the errors.
    Raises EnvironmentFault if another process holds it, or if the file system cannot lock.
    """
    descriptor = _open(folder, lock, what, setting)
    try:
        _acquire(descriptor, folder, lock, what, setting)
        _held.add(descriptor)
        _sign(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(
            descriptor
        )  # the file stays: unlinking it would let two processes lock two files of one name


def lock_holder(run_dir: RunDir) -> dict[str, Any] | None:
    """Who holds the run now (pid, host, time; values None if not readable), or None if nobody does."""
    try:
        descriptor = os.open(run_dir.lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _signature(run_dir.lock)
    finally:
        os.close(descriptor)


def _open(folder: Path, lock: Path, what: str, setting: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise EnvironmentFault(
            f"the {what} directory {folder} cannot be written",
            error.strerror or str(error),
            f"choose another {setting}, or make this one writable",
        ) from error


def _acquire(descriptor: int, folder: Path, lock: Path, what: str, setting: str) -> None:
    # lock_holder takes the lock for an instant to look: only who holds it for longer is a real holder
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt < 9:
                time.sleep(0.03)
        except OSError as error:
            raise EnvironmentFault(
                f"{lock} cannot be locked",
                f"the file system refuses: {error.strerror}",
                f"put the {what} directory on a file system with flock (for Lustre: mount with -o flock)",
            ) from error
    holder = _signature(lock)
    raise EnvironmentFault(
        f"the {what} {folder} is in use",
        f"process {holder['pid']} on host {holder['host']} holds it since {holder['time']}",
        f"wait for it, stop it, or choose another {setting}",
    )


def _sign(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": now}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _signature(path: Path) -> dict[str, Any]:
    signature: dict[str, Any] = {"pid": None, "host": None, "time": None}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return signature  # the holder is between locking and signing
    if isinstance(found, dict):
        signature.update({key: found[key] for key in signature if key in found})
    return signature


def _close_in_child() -> None:
    # A forked worker shares the lock: it would keep the run locked after its parent is killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
