"""The directory as one picture that pages ask for: looked at when they ask, and never more often than it changes."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainway.board.charts import ChartStore
from trainway.board.jobs import Jobs
from trainway.board.masking import Masker
from trainway.board.place import Found, Place, search
from trainway.board.runs import RunWatch
from trainway.planning.prices import load_prices

FRESH_S = 0.9
"""Pages that ask within this time share one look."""
SEARCH_S = 3.0
SEARCH_SHARE = 50
"""A search that takes t seconds is not made again for so many times t."""
MOST_GONE = 1000
PARSING_S = 0.4
"""For reading configurations in one look: with many new runs the others follow at the next."""


class Board:
    """What the server serves. Every method may be called from any thread."""

    def __init__(
        self, directory: Path, *, clock: Callable[[], float] = time.time, masker: Masker | None = None
    ) -> None:
        """Raises ConfigError when there is no such directory."""
        self.place = Place(directory)
        self.masker = masker or Masker()
        self.charts = ChartStore(self.place, self.masker)
        self._clock, self._lock = clock, threading.Lock()
        self._prices = load_prices()
        self._jobs = Jobs(self.place, self.masker)
        self._runs: dict[str, RunWatch] = {}
        self._changed: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._found, self._searched, self._search_again = Found(), False, 0.0
        self._looked = -FRESH_S
        self._epoch, self._version = secrets.token_hex(4), 0
        self._about: tuple[Any, ...] = ()
        self._about_changed = 0
        self._pending = False

    def runs(self, since: str = "") -> tuple[str, dict[str, Any]]:
        """(token, the runs that changed since the token `since`, or all): what the list shows."""
        with self._lock:
            self._look()
            version = self._version_of(since)
            ids = [key for key, changed in self._changed.items() if changed > version]
            found: dict[str, Any] = {
                "whole": version < 0,
                "runs": [self._runs[key].row for key in ids],
                "gone": [key for key, at in self._gone.items() if at > version] if version >= 0 else [],
                "pending": self._pending,
            }
            if self._about_changed > version:
                found |= {
                    "directory": self.masker.text(self.place.root),
                    "jobs": self._job_rows(),
                    "complete": self._found.complete,
                }
            return f"{self._epoch}.{self._version}", found

    def find(self, key: str) -> RunWatch | None:
        """The run of that id; None for one that is not there."""
        with self._lock:
            self._look()
            return self._runs.get(key)

    def _version_of(self, since: str) -> int:
        epoch, _, version = since.partition(".")
        known = epoch == self._epoch and version.isascii() and version.isdigit() and len(version) < 16
        return int(version) if known else -1

    def _look(self) -> None:
        started = time.monotonic()
        if started - self._looked < FRESH_S:
            return
        now = self._clock()
        self._search(started)
        self._jobs.look(self._found.jobs, now)
        version, parsing_ends = self._version + 1, time.monotonic() + PARSING_S
        self._pending, changed = False, False
        for key, run in self._runs.items():
            parse = time.monotonic() < parsing_ends or not run.needs_parsing
            self._pending |= not parse
            path = run.run.path
            if run.look(now, self._jobs.costs.get(path), stalled=path in self._jobs.stalled, parse=parse):
                self._changed[key] = version
                changed = True
        about = (self._job_rows(), self._found.complete)
        if about != self._about:
            self._about, self._about_changed, changed = about, version, True
        if changed or any(at == version for at in self._gone.values()):
            self._version = version
        self._looked = time.monotonic()

    def _search(self, now: float) -> None:
        if self._searched and now < self._search_again:
            return
        self._found, self._searched = search(self.place), True
        took = time.monotonic() - now
        self._search_again = now + max(SEARCH_S, SEARCH_SHARE * took)
        paths = set(self._found.runs)
        known = {run.run.path: key for key, run in self._runs.items()}
        for path in known.keys() - paths:
            key = known[path]
            del self._runs[key], self._changed[key]
            self._gone[key] = self._version + 1
        if len(self._gone) > MOST_GONE:  # pages begin anew, and need no list of what is gone
            self._gone, self._epoch = {}, secrets.token_hex(4)
        for path in self._found.runs:
            if path not in known:
                run = RunWatch(self.place, path, self.masker, self._prices)
                self._runs[run.id] = run
                self._gone.pop(run.id, None)

    def _job_rows(self) -> list[dict[str, Any]]:
        ids = {run.run.path: key for key, run in self._runs.items()}
        return [
            {
                **{name: value for name, value in row.items() if name != "run_path"},
                "run": ids.get(row["run_path"]),
            }
            for row in self._jobs.rows
        ]
