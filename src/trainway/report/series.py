"""The metrics of a run as series that fit on a screen: metrics.jsonl, read on as it grows, in bounded memory."""

from __future__ import annotations

import json
import math
import os
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 4 << 20
"""Bytes. A line beyond it is no record of ours, and is passed over rather than kept in memory."""
SEAM_BYTES = 256
"""Of what was read last: while they still stand before the place to read on from, the file is the same one."""


@dataclass(frozen=True)
class Columns:
    """One metric over the steps, in buckets of equal step width; all columns have the same length."""

    steps: list[int]
    """Mean step of each bucket's values; the step itself while buckets are one step wide."""
    low: list[float]
    mean: list[float]
    high: list[float]
    """Of the finite values of a bucket; NaN where it has none, such as a loss that has overflowed."""
    width: int
    """Steps that a bucket spans."""

    def to_json(self) -> dict[str, list[Any]]:
        """For `TrainwayCharts`: five significant digits, null for NaN; low and high only where they differ."""
        found: dict[str, list[Any]] = {"steps": self.steps, "mean": _short(self.mean)}
        if any(low < high for low, high in zip(self.low, self.high, strict=True)):
            found |= {"low": _short(self.low), "high": _short(self.high)}
        return found


class RunSeries:
    """The series of one metrics.jsonl. Its memory depends on the number of metrics, not on the run's length."""

    def __init__(self, path: Path, most_points: int = 2000) -> None:
        """`most_points`: of each metric, at least 2; reaching them halves their number."""
        assert most_points >= 2, most_points
        self._path, self._most_points = path, most_points
        self._begin()

    def _begin(self) -> None:
        self.last: dict[str, tuple[int, float]] = {}
        """Step and value of each metric's newest record, NaN and infinities as they were written."""
        self.not_finite: dict[str, int] = {}
        """How many values of a metric were NaN or infinite, where there were any."""
        self._buckets: dict[str, _Buckets] = {}
        self._read = 0  # bytes
        self._seam = b""
        self._seen: tuple[int, ...] = ()

    def update(self) -> bool:
        """Read what was appended since the last call; True when the series changed.

        A last line without its end is left for the next call. The series begin anew when the file shrank or is
        another one, as after a resume, which drops the records of a future that will not be.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            changed = bool(self._seen)
            self._begin()
            return changed
        with file:
            status = os.fstat(file.fileno())
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen:
                return False
            changed = not self._goes_on(file)
            if changed:
                self._begin()
            self._seen = seen
            return self._read_on(file) or changed

    def columns(self) -> dict[str, Columns]:
        """Every metric's series, in the order in which the metrics first occurred."""
        return {name: buckets.columns() for name, buckets in self._buckets.items()}

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read is still what stands there; always so before anything was read."""
        file.seek(self._read - len(self._seam))
        return file.read(len(self._seam)) == self._seam

    def _read_on(self, file: BinaryIO) -> bool:
        file.seek(self._read)
        rest, changed = b"", False
        while block := file.read(BLOCK_BYTES):
            whole, end, torn = (rest + block).rpartition(b"\n")
            rest = torn
            if end:
                for line in whole.split(b"\n"):
                    changed |= self._add(line)
                self._read += len(whole) + 1
                self._seam = (self._seam + whole[-SEAM_BYTES:] + end)[-SEAM_BYTES:]
            elif len(rest) > LONGEST_LINE:
                # its remainder is no record either, wherever it ends
                self._read, self._seam, rest = self._read + len(rest), rest[-SEAM_BYTES:], b""
        return changed

    def _add(self, line: bytes) -> bool:
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            return False
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not 0 <= step < 1 << 53:  # what a script on the page can count to
            return False
        found = False
        for name, value in record.items():
            kind = type(value)
            if (kind is not float and kind is not int) or name == "step":
                continue
            found = True
            buckets = self._buckets.get(name)
            if buckets is None:
                buckets = self._buckets[name] = _Buckets(self._most_points)
            try:
                value = float(value)
            except OverflowError:  # an integer that no double holds
                value = math.inf
            if not math.isfinite(value):
                self.not_finite[name] = self.not_finite.get(name, 0) + 1
            buckets.add(step, value)
            self.last[name] = (step, value)
        return found


def _short(values: list[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


class _Buckets:
    """Values by step, gathered in buckets whose width doubles when they become too many."""

    def __init__(self, most: int) -> None:
        self._most, self._width = most, 1
        self._index = array("q")  # of each bucket: step // width, ascending
        self._steps = array("d")  # sum of the steps
        self._records = array("q")  # how many steps are in that sum
        self._count = array("q")  # how many values are finite
        self._total, self._low, self._high = array("d"), array("d"), array("d")

    def add(self, step: int, value: float) -> None:
        index = step // self._width
        if self._index and self._index[-1] == index:  # nearly always
            at = len(self._index) - 1
        else:
            at = bisect_left(self._index, index)
            if at == len(self._index) or self._index[at] != index:
                self._insert(at, index)
        self._steps[at] += step
        self._records[at] += 1
        if math.isfinite(value):
            self._count[at] += 1
            self._total[at] += value
            if value < self._low[at]:
                self._low[at] = value
            if value > self._high[at]:
                self._high[at] = value
        if len(self._index) > self._most:
            self._halve()

    def columns(self) -> Columns:
        sums = zip(self._steps, self._records, strict=True)
        means = zip(self._total, self._count, self._low, self._high, strict=True)
        return Columns(
            steps=[round(total / count) for total, count in sums],
            low=[low if low < math.inf else math.nan for low in self._low],
            # rounding must not put the mean of equal values beside them
            mean=[min(max(total / n, low), high) if n else math.nan for total, n, low, high in means],
            high=[high if high > -math.inf else math.nan for high in self._high],
            width=self._width,
        )

    def _insert(self, at: int, index: int) -> None:
        self._index.insert(at, index)
        for column, empty in (
            (self._steps, 0.0),
            (self._total, 0.0),
            (self._low, math.inf),
            (self._high, -math.inf),
        ):
            column.insert(at, empty)
        self._records.insert(at, 0)
        self._count.insert(at, 0)

    def _halve(self) -> None:
        # sparse records far apart may need more than one doubling
        while len(self._index) > self._most:
            self._width *= 2
            old = (self._index, self._steps, self._records, self._count, self._total, self._low, self._high)
            self._index, self._records, self._count = array("q"), array("q"), array("q")
            self._steps, self._total, self._low, self._high = array("d"), array("d"), array("d"), array("d")
            for index, steps, records, count, total, low, high in zip(*old, strict=True):
                if not self._index or self._index[-1] != index // 2:
                    self._insert(len(self._index), index // 2)
                self._steps[-1] += steps
                self._records[-1] += records
                self._count[-1] += count
                self._total[-1] += total
                self._low[-1] = min(self._low[-1], low)
                self._high[-1] = max(self._high[-1], high)
