"""How far a training is, from the files of its run."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from trainway.run_dir import RunDir

_TAIL_BYTES = 1 << 16
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Seen:
    """What a run's files say."""

    step: int
    """The last one on record."""
    saved: int
    """The newest checkpoint's; 0 when there is none."""
    size: int
    """Bytes of the record."""


class Progress:
    """Looks at a run again and again, and knows when it last got on."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._first = self._last = look(run)
        self._progressed: float | None = None

    def look(self, now: float) -> Seen:
        """What the files say at `now`."""
        seen = look(self._run)
        # A training that goes on cuts its record to the step it goes on from: that is no step of its own yet.
        if seen != self._last and (self._progressed is not None or seen.step > self._first.saved):
            self._progressed = now
        self._last = seen
        return seen

    @property
    def progressed(self) -> float | None:
        """When it was last seen to have got on; None before its first step since this began to look."""
        return self._progressed


def look(run: RunDir) -> Seen:
    """What the files of a run say now; zeros where there are none."""
    step, size = _last_step(run)
    return Seen(step, _saved_step(run), size)


def _last_step(run: RunDir) -> tuple[int, int]:
    try:
        with run.metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0, 0
    for line in reversed(lines):  # the last one may be half written
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record["step"], size
    return 0, size


def _saved_step(run: RunDir) -> int:
    try:
        names = os.listdir(run.checkpoints)
    except OSError:
        return 0
    return max((int(found[1]) for name in names if (found := _STEP_NAME.fullmatch(name))), default=0)
