"""Bringing the trackers of runs up to date from metrics.jsonl: `trainway runs sync`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainway.checkpoint.lock import lock_holder
from trainway.errors import ConfigError, DataError
from trainway.files import read_json
from trainway.run_dir import RunDir
from trainway.tracking import fed_trackers, refuse_missing_trackers
from trainway.tracking.follower import TITLES, end_feed, events, start_feed
from trainway.tracking.target import Orders, Target

SILENCE_S = 180.0
"""After which a tracker that says nothing is given up."""


@dataclass(frozen=True)
class Synced:
    """What became of one tracker of one run."""

    run: Path
    tracker: str
    state: Literal["complete", "busy", "lost"]
    """busy: the run goes on, and feeds the tracker itself."""
    steps_to: int | None
    """The newest step that was sent; None: the tracker held everything."""
    where: str
    why: str


def sync_runs(
    runs: Sequence[Path],
    to: Sequence[str] = (),
    *,
    runs_dir: Path = Path("runs"),
    silence_s: float = SILENCE_S,
    report: Callable[[Synced], None] = lambda synced: None,
) -> list[Synced]:
    """Send every tracker what it lacks of the runs; those below `runs_dir` when none is named.

    Args:
        to: wandb, mlflow, trackio; empty means those that each run reports to.
        silence_s: how long a tracker may say nothing.
        report: told what became of each, as soon as it is known.

    Raises:
        ConfigError: there is no such tracker.
        DataError: a directory is no run.
        EnvironmentFault: a tracker is not installed.
    """
    if unknown := [name for name in to if name not in TITLES]:
        raise ConfigError(
            f"--to names {', '.join(unknown)}",
            "TensorBoard reads the run directory itself" if "tensorboard" in unknown else "",
            f"trackers that can be brought up to date: {', '.join(TITLES)}",
        )
    places = [RunDir(path) for path in runs] or _runs_below(runs_dir)
    plan = []
    for run in places:
        tracking = Target.read(run, "", {}).tracking
        names = [name for name in TITLES if name in to] or fed_trackers(tracking)
        refuse_missing_trackers(tracking.model_copy(update={"report_to": tuple(names)}))
        plan += [(run, name) for name in names]
    found = []
    for run, name in plan:
        synced = _sync(run, name, silence_s)
        report(synced)
        found.append(synced)
    return found


def _runs_below(directory: Path) -> list[RunDir]:
    if not directory.is_dir():
        raise DataError(f"there is no directory {directory}", "", "name the runs: trainway runs sync RUN...")
    return [RunDir(path.parent) for path in sorted(directory.glob("*/config.yaml"))]


def _sync(run: RunDir, tracker: str, silence_s: float) -> Synced:
    process = start_feed(run, tracker, Orders(once=True, outcome=_outcome(run)))
    heard: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for event in events(process):
            heard.put(event)
        heard.put(None)

    threading.Thread(target=listen, daemon=True).start()
    where, why, steps_to = "", "its process ended without a word", None
    state: Literal["complete", "busy", "lost"] = "lost"
    try:
        while (event := heard.get(timeout=silence_s)) is not None:
            match event["say"]:
                case "open":
                    where = event["where"]
                case "sent":
                    steps_to = event["step"]
                case "lost":
                    why = event["why"]
                case "busy":
                    state = "busy"
                case "complete":
                    state = "complete"
    except queue.Empty:
        why = f"no answer for {silence_s:g} s"
    finally:
        end_feed(process)
    return Synced(run.path, tracker, state, steps_to, where, why if state == "lost" else "")


def _outcome(run: RunDir) -> str:
    if lock_holder(run) is not None:
        return "running"
    state = read_json(run.status).get("state") if run.status.exists() else None
    return state if state in ("done", "stopped") else "failed"
