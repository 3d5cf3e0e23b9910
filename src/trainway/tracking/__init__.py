"""Trackers: where the metrics of a run go."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any, Protocol

from trainway.config.resolved import fingerprint
from trainway.config.schema import RunConfig, TrackingConfig
from trainway.errors import EnvironmentFault
from trainway.logs import warn
from trainway.run_dir import RunDir
from trainway.tracking.follower import TITLES, Follower, close_all, sync_command
from trainway.tracking.jsonl import JsonlTracker
from trainway.tracking.target import Orders

STOPPED_WAIT_S = 5.0
"""A run that is stopped waits for its trackers no longer: who stops it may not wait either."""


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run behind one: metrics.jsonl always, the others as configured."""

    def __init__(
        self, members: list[Tracker], followers: list[Follower] | None = None, wait_s: float = 0.0
    ) -> None:
        self._members, self._followers, self._wait_s = members, followers or [], wait_s

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for member in self._members:
            member.log(step, metrics)

    def sync(self) -> None:
        for member in self._members:
            member.sync()

    def close(self, outcome: str = "done") -> None:
        """End them. outcome: done, stopped (after a whole step) or failed (perhaps in the middle of one)."""
        for member in self._members:
            member.close()
        wait_s = self._wait_s if outcome == "done" else min(self._wait_s, STOPPED_WAIT_S)
        close_all(self._followers, outcome, wait_s)


def open_trackers(config: RunConfig, run_dir: RunDir, *, first_step: int, is_main: bool) -> Trackers:
    """Open the run's trackers on rank 0; the other ranks get an empty set."""
    if not is_main:
        return Trackers([])
    tracking = config.tracking
    members: list[Tracker] = [JsonlTracker(run_dir.metrics)]
    if "tensorboard" in tracking.report_to:
        from trainway.tracking.tensorboard import TensorBoardTracker

        members.append(TensorBoardTracker(run_dir.tensorboard, first_step))
    learnt = json.dumps(fingerprint(config), sort_keys=True)
    orders = Orders(
        first_step=first_step,
        settings=hashlib.sha256(learnt.encode()).hexdigest()[:32],
        wait_s=tracking.wait_s,
    )
    return Trackers(members, start_followers(tracking, run_dir, orders), tracking.wait_s)


def start_followers(tracking: TrackingConfig, run_dir: RunDir, orders: Orders) -> list[Follower]:
    """Those that can be started: a machine without room for one more process trains all the same."""
    started = []
    for name in fed_trackers(tracking):
        try:
            started.append(Follower(name, run_dir, orders))
        except OSError as error:
            warn(f"{TITLES[name]} is not fed: {error}; after the run: {sync_command(run_dir, name)}")
    return started


def fed_trackers(tracking: TrackingConfig) -> list[str]:
    """Those of `report_to` that are fed from metrics.jsonl by a process of their own, each once."""
    return [name for name in TITLES if name in tracking.report_to]


def refuse_missing_trackers(
    tracking: TrackingConfig, find: Callable[[str], object] = importlib.util.find_spec
) -> None:
    """Raise EnvironmentFault when a tracker that the run names is not installed. find: as importlib's find_spec."""
    if missing := [name for name in fed_trackers(tracking) if find(name) is None]:
        raise EnvironmentFault(
            f"tracking.report_to names {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed",
            "the run would be tracked nowhere but in its directory",
            install_command(missing),
        )


def install_command(names: list[str]) -> str:
    return f"pip install 'trainway[{','.join(names)}]'"
