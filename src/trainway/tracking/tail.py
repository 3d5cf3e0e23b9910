"""metrics.jsonl as rows, one a step, read on while the run writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from trainway.tracking.target import Row

STEP_SECONDS = "perf/step_s"


class Tail:
    """Reads a file of records from its beginning, and what is appended later. Memory: one row and a line's rest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._row: Row | None = None
        self._seconds = 0.0

    def rows(self, most: int) -> list[Row]:
        """The next steps, `most` at once, each whole: a later step follows it. Empty: nothing more for now."""
        found: list[Row] = []
        while len(found) < most and (line := self._line()) is not None:
            record = _record(line)
            if record is None:
                continue
            step, figures = record["step"], numbers(record)
            self._seconds += figures.get(STEP_SECONDS, 0.0)
            if self._row is not None and self._row.step == step:
                self._row = Row(step, self._seconds, {**self._row.numbers, **figures})
                continue
            if self._row is not None:
                found.append(self._row)
            self._row = Row(step, self._seconds, figures)
        return found

    def last(self) -> list[Row]:
        """The step at the end of the file, which no other follows."""
        return [] if self._row is None else [self._row]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _line(self) -> bytes | None:
        if self._file is None:
            if not self._path.exists():
                return None
            self._file = self._path.open("rb")
        self._rest += self._file.readline()
        if not self._rest.endswith(b"\n"):
            return None  # the end, or a line that is still being written
        line, self._rest = self._rest, b""
        return line


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by their names; the step, texts and truth values are none."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def last_step(path: Path) -> int:
    """The step of the last record; -1 without one."""
    tail = Tail(path)
    try:
        while tail.rows(1000):
            pass
        return max((row.step for row in tail.last()), default=-1)
    finally:
        tail.close()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
