"""Hashes of files, remembered: a file's content is read again only when the file has changed.

A hash is kept with the file's size, inode, modification and change time. No program can set the change time, so every
rewriting is seen.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainway.data.turns import turn
from trainway.errors import DataError
from trainway.files import atomic_write, hash_file, read_json

SETTLED_S = 2.0
"""A file that changed more recently may change again without a new time: its hash is not remembered."""


def remembered_hashes(
    files: Sequence[Path], memory: Path, hashed: Callable[[int], None] = lambda size: None
) -> list[str]:
    """xxh3_128 of each file's bytes as 32 hex digits; `memory`: a JSON file of what is known; `hashed`: told each size."""
    known = _recalled(memory)
    fresh: dict[str, list[Any]] = {}
    result = []

    def hash_of(file: Path) -> str:
        path = str(file.absolute())
        state = _file_state(file)
        if known.get(path, [])[:-1] == state:
            return str(known[path][-1])
        began = time.time_ns()
        digest = hash_file(file)
        if _file_state(file) == state and max(state[2:]) < began - SETTLED_S * 1e9:
            fresh[path] = [*state, digest]
        return digest

    with ThreadPoolExecutor() as threads:
        for file, digest in zip(files, threads.map(hash_of, files), strict=True):
            result.append(digest)
            hashed(file.stat().st_size)
    if fresh:
        with turn(memory.with_suffix(".lock")):
            atomic_write(memory, json.dumps({**_recalled(memory), **fresh}))
    return result


def _file_state(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _recalled(memory: Path) -> dict[str, list[Any]]:
    try:
        known = read_json(memory)
    except DataError:  # absent or damaged: everything is hashed again
        return {}
    if not isinstance(known, dict):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, list)}
