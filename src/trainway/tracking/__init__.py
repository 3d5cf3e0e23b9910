"""Trackers: where the metrics of a run go."""

from __future__ import annotations

from typing import Any, Protocol

from trainway.config.schema import TrackingConfig
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import JsonlTracker


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run behind one: metrics.jsonl always, the others as configured."""

    def __init__(self, members: list[Tracker]) -> None:
        self._members = members

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for member in self._members:
            member.log(step, metrics)

    def sync(self) -> None:
        for member in self._members:
            member.sync()

    def close(self) -> None:
        for member in self._members:
            member.close()


def open_trackers(config: TrackingConfig, run_dir: RunDir, *, first_step: int, is_main: bool) -> Trackers:
    """Open the run's trackers on rank 0; the other ranks get an empty set."""
    if not is_main:
        return Trackers([])
    members: list[Tracker] = [JsonlTracker(run_dir.metrics)]
    if "tensorboard" in config.report_to:
        from trainway.tracking.tensorboard import TensorBoardTracker

        members.append(TensorBoardTracker(run_dir.tensorboard, first_step))
    return Trackers(members)
