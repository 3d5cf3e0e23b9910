"""The series of the runs that somebody looks at, and what of them is new since a page asked last."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainway.board.masking import Masker
from trainway.board.place import Place, Signature, signature
from trainway.report.series import RunSeries

MOST_POINTS = 800
"""Of each metric: no chart of the page is wider in pixels by much."""
MOST_RUNS = 10
"""Whose series are kept: as many as a page compares, and some."""
KEPT_S = 300.0
"""Without being asked for."""
VERSIONS = 3
"""Of a run's columns that are kept, to send only what is new to pages that ask at different times."""

MUCH_BYTES = 4 << 20
"""Unread: it is read in a thread of its own, and the page told that it goes on."""
PATIENCE_S = 0.8

Curve = dict[str, list[Any]]


@dataclass
class _Entry:
    series: RunSeries
    path: Path
    asked: float = 0.0
    seen: Signature | None = None
    epoch: str = field(default_factory=lambda: secrets.token_hex(4))
    version: int = 0
    columns: deque[tuple[int, dict[str, Curve]]] = field(default_factory=lambda: deque(maxlen=VERSIONS))
    lock: threading.Lock = field(default_factory=threading.Lock)
    reading: threading.Thread | None = None
    """What reads the series on, where there is much to read; nothing else touches the series while it lives."""


class ChartStore:
    """Keeps the series of a few runs. Every method may be called from any thread."""

    def __init__(self, place: Place, masker: Masker | None = None) -> None:
        self._place = place
        self._mask = (masker or Masker()).text
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, key: str, metrics: Path, since: str = "") -> tuple[str, dict[str, Any]]:
        """(token, the series): whole, or where the page has those of the token `since`, what comes after them.

        {"whole", "curves": {metric: {"at": points that stay, "steps", "mean", "low"?, "high"?}}}; `at` is 0 where a
        series is whole. While a long record is still being read there are no curves, but "pending".
        """
        entry = self._entry(key, metrics)
        with entry.lock:
            if not self._update(entry):
                return "", {"whole": False, "curves": {}, "gone": [], "pending": True}
            token = f"{entry.epoch}.{entry.version}"
            new = entry.columns[-1][1] if entry.columns else {}
            old = self._known(entry, since)
            if old is None:
                return token, {
                    "whole": True,
                    "curves": {name: {"at": 0, **curve} for name, curve in new.items()},
                }
            curves = {
                name: _after(old.get(name), curve) for name, curve in new.items() if old.get(name) != curve
            }
            return token, {"whole": False, "curves": curves, "gone": sorted(old.keys() - new.keys())}

    def forget_old(self) -> None:
        """Give back the memory of what nobody looks at any more."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, entry in self._entries.items() if now - entry.asked > KEPT_S]:
                del self._entries[key]
            while len(self._entries) > MOST_RUNS:
                self._entries.popitem(last=False)

    def _entry(self, key: str, metrics: Path) -> _Entry:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.path != metrics:
                entry = self._entries[key] = _Entry(RunSeries(metrics, MOST_POINTS), metrics)
            self._entries.move_to_end(key)
            entry.asked = time.monotonic()
        self.forget_old()
        return entry

    def _update(self, entry: _Entry) -> bool:
        """False while a long record is still being read."""
        now = signature(entry.path)
        if entry.reading is None and now == entry.seen and entry.columns:
            return True
        if now is None or not self._place.is_reached(entry.path):
            entry.series, entry.reading, found = RunSeries(entry.path, MOST_POINTS), None, {}
        elif not _read_on(entry, now):
            return False
        else:
            found = {self._mask(name): column.to_json() for name, column in entry.series.columns().items()}
        entry.seen = now
        if not entry.columns or found != entry.columns[-1][1]:
            entry.version += 1
            entry.columns.append((entry.version, found))
        return True

    def _known(self, entry: _Entry, since: str) -> dict[str, Curve] | None:
        epoch, _, version = since.partition(".")
        if epoch != entry.epoch:
            return None
        return next((columns for number, columns in entry.columns if str(number) == version), None)


def _read_on(entry: _Entry, now: Signature) -> bool:
    """Bring the series up to date; False while that takes longer than a page should wait."""

    def read(series: RunSeries) -> None:
        with suppress(OSError):  # it may not be read, or is gone again
            series.update()

    if entry.reading is None:
        if now[1] - (entry.seen[1] if entry.seen else 0) < MUCH_BYTES:
            read(entry.series)
            return True
        entry.reading = threading.Thread(target=read, args=(entry.series,), daemon=True)
        entry.reading.start()
    entry.reading.join(PATIENCE_S)
    if entry.reading.is_alive():
        return False
    entry.reading = None
    return True


def _after(old: Curve | None, new: Curve) -> dict[str, Any]:
    """What of `new` a page needs that has `old`: points that both begin with stay."""
    if old is None or old.keys() != new.keys():
        return {"at": 0, **new}
    # only the last buckets of a run that goes on are still filled: nearly always all but one or two stay
    at = max(0, min(len(old["steps"]), len(new["steps"])) - 1)
    while at and any(old[name][:at] != new[name][:at] for name in new):
        at = at // 2 if at > 8 else 0
    return {"at": at, **{name: values[at:] for name, values in new.items()}}
