"""metrics.jsonl: one JSON line per record, the run's own memory of its metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainway.files import atomic_write


class JsonlTracker:
    """Appends records; every line reaches the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put what was written on the disk: called with every checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file; a last line cut off by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def cut_after(path: Path, step: int) -> None:
    """Drop the records after `step`: a resumed run writes them again, identical."""
    if not path.exists():
        return
    kept = [json.dumps(record) for record in read_jsonl(path) if record["step"] <= step]
    atomic_write(path, "".join(line + "\n" for line in kept))
