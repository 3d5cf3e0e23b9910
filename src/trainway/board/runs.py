"""One run as the list shows it: its state, how far it is, its newest figures; followed at the cost of what was appended."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from trainway.board.costs import Cost, costs_at_list_price, list_price
from trainway.board.masking import Masker
from trainway.board.place import Place, Signature, signature
from trainway.board.settings import MOST_BYTES, Settings, read_settings
from trainway.board.tail import Tail
from trainway.checkpoint.lock import lock_holder
from trainway.planning.prices import PriceList
from trainway.run_dir import RunDir

METRICS_TAIL = 64 << 10
VALIDATION_BYTES = 4 << 20
"""Searched, from the end, for the newest validation when a run is looked at first."""
LOG_TAIL = 64 << 10
LOG_HEAD = 16 << 10
RECORD_BYTES = 256 << 10
"""Most that a status, a report or a provenance may have."""
SILENT_STEPS = 20
"""A run without a sign for as long as so many of its steps, and for its watchdog's patience, stands still."""
COPY_SILENT_S = 900.0
"""A copy that is brought from elsewhere grows now and then only."""
_PROGRESS = re.compile(r"\[TRAIN\] step (\d{1,15})/(\d{1,15})\b|\[STEP\] (\d{1,15}) steps of")
_PROCESSES = re.compile(r"\[DDP\] \S+ on (\d{1,6}) process")
_DEVICE = re.compile(r"\(([^()]{1,80}) data sheet")
_LEVEL = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (WARNING|ERROR|CRITICAL) (.*)")


@dataclass(frozen=True)
class Warning:
    """One line of the log that asks for attention."""

    time: str
    level: str
    text: str


@dataclass
class Figures:
    """What the newest records of metrics.jsonl say."""

    step: int = 0
    last: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By metric: step and value."""
    stage: str = ""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """Of the newest steps."""

    def add(self, line: bytes) -> None:
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            return
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not 0 <= step < 1 << 53:
            return
        self.step = max(self.step, step)
        for name, value in record.items():
            if name == "step":
                continue
            if type(value) is float or (type(value) is int and abs(value) < 1 << 53):
                self.last[name] = (step, float(value))
        if isinstance(record.get("gad/stage"), str):
            self.stage = record["gad/stage"][:40]
        seconds = record.get("perf/step_s")
        if type(seconds) is float and 0 < seconds < 1e7:
            self.seconds.append(seconds)

    @property
    def step_s(self) -> float | None:
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


class RunWatch:
    """Follows one run directory. `look` reads what was appended; `row` is what the list shows."""

    def __init__(self, place: Place, path: Path, masker: Masker, prices: PriceList) -> None:
        self.run, self.id = RunDir(path), run_id(place, path)
        self.name = masker.text(path.name)
        self.folder = masker.text(
            "" if place.root in (path, path.parent) else str(path.parent.relative_to(place.root))
        )
        self._place, self._masker, self._prices = place, masker, prices
        self._metrics = Tail(place, self.run.metrics, METRICS_TAIL)
        self._log = Tail(place, self.run.log, LOG_TAIL)
        self._files = {
            path: Record(place, path)
            for path in (self.run.status, self.run.report, self.run.provenance, self.run.start)
        }
        self._config_seen: Signature | None = None
        self.settings = Settings()
        self.figures = Figures()
        self.warnings: deque[Warning] = deque(maxlen=100)
        self.warned = 0
        self._total: int | None = None
        self._device, self._processes = "", 1
        self.row: dict[str, Any] = {}

    def look(
        self, now: float, cost: Cost | None = None, *, stalled: bool = False, parse: bool = True
    ) -> bool:
        """Read what is new; True when the row is another one.

        cost, stalled: where a job knows what the run costs, and that it was ended because it stood still.
        parse: read a new configuration too, which costs a thousand times the rest.
        """
        if parse:
            self._read_config()
        lines, anew = self._metrics.read()
        if anew:
            self.figures = Figures()
        for line in lines:
            self.figures.add(line)
        if anew and "val/loss" not in self.figures.last:
            self._find_validation()
        self._read_log()
        for record in self._files.values():
            record.read()
        row = self._make_row(now, cost, stalled)
        changed = row != self.row
        self.row = row
        return changed

    @property
    def needs_parsing(self) -> bool:
        """Whether the next look costs more than the usual: the configuration is new or another one."""
        return signature(self.run.config) != self._config_seen

    # ---- reading

    def _read_config(self) -> None:
        now = signature(self.run.config)
        if now == self._config_seen:
            return
        self._config_seen = now
        self.settings = Settings()
        if now is not None:
            with suppress(OSError):
                content = self._place.read(self.run.config, MOST_BYTES)
                self.settings = read_settings(content, self._masker)

    def _find_validation(self) -> None:
        """The newest validation, which may lie far before the newest steps."""
        with suppress(OSError), self._place.open(self.run.metrics) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - VALIDATION_BYTES))
            data = file.read(VALIDATION_BYTES)
            at = data.rfind(b'"val/loss"')
            begin, end = data.rfind(b"\n", 0, max(at, 0)) + 1, data.find(b"\n", at)
            if at >= 0 and end >= 0:
                self.figures.add(data[begin:end])

    def _read_log(self) -> None:
        lines, anew = self._log.read()
        if anew:
            self.warnings.clear()
            self.warned, self._total = 0, None
            if self._log.seen is not None and self._log.seen[1] > LOG_TAIL:
                with suppress(OSError):  # what a launch says of its machine stands at the beginning
                    self._note(self._place.read(self.run.log, LOG_HEAD).split(b"\n")[:-1])
        self._note(lines)

    def _note(self, lines: list[bytes]) -> None:
        for raw in lines:
            line = raw[:4000].decode("utf-8", "replace")
            if found := _LEVEL.match(line):
                self.warnings.append(Warning(found[1], found[2].lower(), self._masker.text(found[3])))
                self.warned += 1
            elif found := _PROGRESS.search(line):
                self._total = int(found[2] or found[3])
            elif found := _PROCESSES.search(line):
                self._processes = int(found[1])
            if found := _DEVICE.search(line):
                self._device = found[1]

    # ---- what it amounts to

    def _make_row(self, now: float, cost: Cost | None, stalled: bool) -> dict[str, Any]:
        status, report, provenance, start = (record.content for record in self._files.values())
        changed = max(self._metrics.changed, self._log.changed, self._files[self.run.status].changed)
        state = self._state(status, changed, now)
        if stalled and state in ("killed", "stopped", "failed"):
            state = "stalled"
        began = _moment(provenance.get("started"))
        step = max(self.figures.step, _count(status.get("step")) if not self.figures.step else 0)
        total = self._total or _count(start.get("total_steps")) or self.settings.total_steps
        known = start.get("device")
        device = known if isinstance(known, str) else self._device
        processes = _count(start.get("world_size")) or self._processes
        if state == "done":
            total = step = _count(report.get("steps")) or step
        step_s, alive = self.figures.step_s, state in ("running", "stalled")
        left = (total - step) * step_s if alive and total and step_s else None
        if cost is None and (priced := list_price(self._prices, device, processes)):
            cost = costs_at_list_price(*priced, began, changed, goes_on=alive)
        return {
            "id": self.id,
            "name": self.name,
            "folder": self.folder,
            "state": state,
            "recipe": self.settings.recipe,
            "model": self.settings.model,
            "stage": self._masker.text(self.figures.stage),
            "step": step,
            "total": total,
            "seconds_left": None if left is None else round(left),
            "step_s": step_s,
            "figures": self._figures(status),
            "began": began,
            "changed": round(changed, 1) or None,
            "seconds": _number(report.get("seconds")),
            "cost": cost.to_json() if cost else None,
            "device": self._masker.text(f"{processes} x {device}" if device else ""),
            "warned": self.warned,
            "error": self._masker.text(status.get("error") or "")[:2000] if state != "running" else "",
        }

    def _state(self, status: dict[str, Any], changed: float, now: float) -> str:
        said = status.get("state")
        if said == "done":
            return "done"
        if self._is_held():
            patience = max(self.settings.stall_s, SILENT_STEPS * (self.figures.step_s or 0.0))
            return "stalled" if changed and now - changed > patience else "running"
        if said in ("stopped", "failed"):
            return str(said)
        if said == "running":
            if signature(self.run.lock) is not None:
                return "killed"  # the kernel dropped the lock with the process
            return "running" if now - changed < COPY_SILENT_S else "stalled"
        return "new"

    def _is_held(self) -> bool:
        if signature(self.run.lock) is None:
            return False
        try:
            return lock_holder(self.run) is not None
        except OSError:
            return False

    def _figures(self, status: dict[str, Any]) -> dict[str, list[Any]]:
        """{metric: [step, value]}; a value that is no number of JSON's as its name."""
        found: dict[str, list[Any]] = {
            self._masker.text(name): [step, _for_json(value)]
            for name, (step, value) in list(self.figures.last.items())[:200]
        }
        if "val/loss" not in found and (loss := _number(status.get("val_loss"))) is not None:
            found["val/loss"] = [_count(status.get("step")), loss]
        return found

    def provenance(self) -> dict[str, Any]:
        """As read last; {} without one."""
        return self._files[self.run.provenance].content

    def warnings_json(self) -> list[dict[str, str]]:
        """The newest last."""
        return [asdict(warning) for warning in self.warnings]


class Record:
    """One small JSON file of a run, read again when it has changed; {} while it is missing or damaged."""

    def __init__(self, place: Place, path: Path) -> None:
        self._place, self._path = place, path
        self._seen: Signature | None = None
        self.content: dict[str, Any] = {}

    @property
    def changed(self) -> float:
        return self._seen[2] / 1e9 if self._seen else 0.0

    def read(self) -> bool:
        """True when it is another one."""
        now = signature(self._path)
        if now == self._seen:
            return False
        self._seen, self.content = now, {}
        if now is not None and now[1] <= RECORD_BYTES:
            with suppress(OSError, ValueError, RecursionError):
                found = json.loads(self._place.read(self._path, RECORD_BYTES))
                self.content = found if isinstance(found, dict) else {}
        return True


def run_id(place: Place, path: Path) -> str:
    """What requests call a run: the same as long as it lies where it lies, and no part of a path."""
    return hashlib.sha256(str(path.relative_to(place.root)).encode("utf-8", "surrogateescape")).hexdigest()[
        :16
    ]


def _for_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def _moment(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None
