"""Jobs on the board: those whose own files lie in the directory, and those that this machine has started elsewhere."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainway.board.costs import Cost, number
from trainway.board.masking import Masker
from trainway.board.place import Place
from trainway.board.runs import Record as JsonFile
from trainway.errors import UserError
from trainway.jobs.orders import JobDir
from trainway.jobs.record import Record, list_records, records_dir

log = logging.getLogger(__name__)

REMEMBERED_S = 7 * 24 * 3600.0
"""For which an ended job of this machine is still shown."""


@dataclass
class Jobs:
    """All jobs that are known, read again when their files change. No provider is asked."""

    place: Place
    masker: Masker
    rows: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[Path, Cost] = field(default_factory=dict)
    """By run directory."""
    stalled: set[Path] = field(default_factory=set)
    """Run directories whose job was ended because it stood still."""
    _files: dict[Path, tuple[JsonFile, JsonFile]] = field(default_factory=dict)
    _records: list[Record] = field(default_factory=list)
    _records_seen: list[tuple[str, int]] | None = None

    def look(self, directories: list[Path], now: float) -> None:
        """`directories`: those of jobs, as `place.search` has found them."""
        self._files = {path: self._files.get(path) or self._open(path) for path in directories}
        self._read_records()
        rows: list[dict[str, Any]] = []
        self.costs, self.stalled = {}, set()
        for path, files in self._files.items():
            for file in files:
                file.read()
            if row := self._row_of_files(path, *(file.content for file in files)):
                rows.append(row)
        told = {row["job"] for row in rows}
        for record in self._records:
            row = self._row_of_record(record, now)
            if record.name not in told and row is not None:
                rows.append(row)
        self.rows = rows

    def _open(self, path: Path) -> tuple[JsonFile, JsonFile]:
        job = JobDir(path)
        return JsonFile(self.place, job.orders), JsonFile(self.place, job.state)

    def _row_of_files(
        self, path: Path, orders: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any] | None:
        if not state and not orders:
            return None
        began, updated = number(state, "began"), number(state, "updated")
        limits = orders.get("limits")
        goes_on = not state.get("outcome") and state.get("stage") != "ended"
        cost = Cost(
            number(orders, "dollars_per_hour"),
            number(state, "dollars"),
            updated,
            goes_on,
            f"job {path.name}",
        )
        run = self._run_of(path, orders)
        if run is not None and state:
            if cost.per_hour:
                self.costs[run] = cost
            if state.get("outcome") == "stalled":
                self.stalled.add(run)
        return {
            "job": self._text(state.get("job") or orders.get("job") or path.name),
            "target": "here",
            "stage": self._text(state.get("stage") or "asked"),
            "outcome": self._text(state.get("outcome") or ""),
            "reason": self._text(state.get("reason") or ""),
            "step": number(state, "step"),
            "total": number(state, "total_steps"),
            "restarts": max(0, number(state, "attempts") - 1),
            "began": began,
            "updated": updated,
            "cost": cost.to_json() if cost.per_hour else None,
            "limit_dollars": number(limits, "dollars") if isinstance(limits, dict) else 0,
            "run_path": run,
        }

    def _run_of(self, path: Path, orders: dict[str, Any]) -> Path | None:
        """Where the job's run is: seen from the volume's root, which holds jobs/NAME."""
        config, root = orders.get("config"), path.parent.parent
        named = config.get("run_dir") if isinstance(config, dict) else None
        try:
            found = root / (named if isinstance(named, str) and named else f"runs/{orders.get('job')}")
            return found if found.is_relative_to(self.place.root) and ".." not in found.parts else None
        except ValueError:
            return None

    def _read_records(self) -> None:
        try:
            seen = sorted((path.name, path.stat().st_mtime_ns) for path in records_dir().glob("*.json"))
        except OSError:
            return
        if seen == self._records_seen:
            return
        self._records_seen = seen
        try:
            self._records = list_records()
        except (UserError, OSError) as error:
            log.debug("the records of jobs are passed over: %s", error)
            self._records = []

    def _row_of_record(self, record: Record, now: float) -> dict[str, Any] | None:
        goes_on = record.phase in ("asked", "up")
        ended = record.ended or (now if goes_on else record.created)
        if not goes_on and now - ended > REMEMBERED_S:
            return None
        cost = Cost(
            record.dollars_per_hour,
            record.dollars_per_hour * (0.0 if goes_on else ended - record.created) / 3600,
            record.created if goes_on else ended,
            goes_on,
            f"job {record.name}, by its price and the clock",
        )
        run = self._local_run(record)
        if run is not None and record.dollars_per_hour:
            self.costs.setdefault(run, cost)
        return {
            "job": self._text(record.name),
            "target": record.target,
            "stage": record.phase,
            "outcome": "",
            "reason": self._text(f"{record.num_gpus} x {record.gpu}" if record.gpu else ""),
            "step": 0,
            "total": 0,
            "restarts": 0,
            "began": record.created,
            "updated": ended if not goes_on else None,
            "cost": cost.to_json() if record.dollars_per_hour else None,
            "limit_dollars": record.limit_dollars or 0,
            "run_path": run,
        }

    def _local_run(self, record: Record) -> Path | None:
        if record.target != "local" or not record.root:
            return None
        found = Path(record.root) / "runs" / record.name
        return found if found.is_relative_to(self.place.root) else None

    def _text(self, value: Any) -> str:
        return self.masker.text(value)[:500]
