"""Which machine's Trainway has started something: a mark on all that is rented, so that `reap` ends nobody else's."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

from trainway.files import disk_faults
from trainway.planning.measured import state_dir

UNKNOWN = "NEW"
"""In what is only shown: nothing is written for that."""


def origin() -> str:
    """Sixteen hex digits, beside the records of the jobs; made once. Whoever shares the records shares it.

    Raises EnvironmentFault when it cannot be written.
    """
    if (found := known_origin()) is not None:
        return found
    path = _path()
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of many at once the first one's counts, for all
            if (found := known_origin()) is None:
                found = secrets.token_hex(8)
                file.truncate(0)  # a damaged one says nothing: what it marked is lost already
                file.write(f"{found}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            return found


def known_origin() -> str | None:
    """None before the first job."""
    try:
        text = _path().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{16}", text) else None


def _path() -> Path:
    return state_dir() / "origin"
