"""The stages of a job as command lines: what is run in which order, and what each may read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.files import atomic_write
from trainway.jobs.hub import hub_repository, release_words
from trainway.jobs.orders import JobDir, Orders, PodState, Stage
from trainway.recipes.volume import Volume, hub_environment, token_environment
from trainway.run_dir import RunDir

TRAINWAY = (sys.executable, "-m", "trainway")
COPYING = (sys.executable, "-m", "trainway.pod.copying")


@dataclass(frozen=True)
class Step:
    """One command of a stage."""

    stage: Stage
    command: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where one node works."""

    root: Path
    job_dir: JobDir
    """This node's own files."""
    rank: int
    run: RunDir
    experiment: str


def place_of(orders: Orders, job_dir: JobDir, rank: int) -> Place:
    """The place of a node; in the boot stages the run's directory follows from the experiment, the job's name."""
    root = Path(orders.root).expanduser().absolute()
    volume = Volume(root, orders.job)
    run = volume.run if orders.boot else RunDir(root / str(run_config(orders)["run_dir"]))
    return Place(root, job_dir, rank, run, orders.job)


def run_config(orders: Orders) -> dict[str, Any]:
    """The run's settings, with a directory of its own whatever the orders say: each start must find the one before."""
    return {**orders.config, "run_dir": orders.config.get("run_dir") or f"runs/{orders.job}"}


def total_steps(orders: Orders) -> int:
    """The steps of the run where the settings say them, else 0."""
    train = orders.config.get("train")
    total = train.get("total_steps") if isinstance(train, dict) else None
    return total if isinstance(total, int) else 0


def write_orders(orders: Orders, place: Place) -> None:
    """Put the orders and the run's configuration among this node's files."""
    from trainway.config.files import yaml_text

    atomic_write(place.job_dir.config, yaml_text(run_config(orders)))
    text = (orders.model_dump_json(indent=1) + "\n").encode()
    if not place.job_dir.orders.exists() or place.job_dir.orders.read_bytes() != text:
        atomic_write(place.job_dir.orders, text)


def preparation(orders: Orders, place: Place, trainway: tuple[str, ...] = TRAINWAY) -> list[Step]:
    """What comes before the training: the checks, and the boot stages or the data."""
    config = str(place.job_dir.config)
    back = _bringing_back(orders, place)
    if not orders.boot:
        return [
            *back,
            Step("doctor", (*trainway, "doctor", config)),
            Step("prepare", (*trainway, "prepare", config)),
        ]
    boot = [*trainway, "orchestrate", "--mode", "cloud", "--no-train", "--config", config]
    boot += ["--root", str(place.root), "--experiment", place.experiment]
    boot += [word for path in orders.inputs for word in ("--input", path)]
    return [
        *back,
        # the run's data is not there yet: the machine alone first, then all of it
        Step("doctor", (*trainway, "doctor")),
        Step("prepare", tuple(boot)),
        Step("doctor", (*trainway, "doctor", *_booted(place))),
    ]


def training(orders: Orders, place: Place, trainway: tuple[str, ...] = TRAINWAY) -> Step:
    """The training itself, which goes on from the newest checkpoint."""
    source = _booted(place) if orders.boot else (str(place.job_dir.config),)
    processes = "auto" if orders.processes is None else str(orders.processes)
    return Step("train", (*trainway, "train", *source, "--resume", "auto", "--nproc", processes))


def release(orders: Orders, place: Place, trainway: tuple[str, ...] = TRAINWAY) -> list[Step]:
    """The chosen checkpoint to where it was promised; nothing when it is exported there already.

    A release to the Hub completes itself: the same words again do what is still to be done.
    """
    to = orders.release.to
    if to is None:
        return []
    remote = "://" in to
    out = place.job_dir.exported if remote else place.root / to
    which = str(orders.release.which)
    if which == "best" and not (place.run.checkpoints / "best").exists():
        which = "latest"  # nothing was evaluated
    if hub_repository(to) is not None:
        words = release_words(orders.release, str(place.run.path), which, _spent(place))
        return [Step("release", (*trainway, *words))]
    export = (*trainway, "export", str(place.run.path), "--out", str(out), "--which", which)
    # an export is complete or not there at all
    steps = [] if out.exists() else [Step("release", export + ("--merge",) * orders.release.merge)]
    return [*steps, Step("release", (*COPYING, "tree", str(out), to))] if remote else steps


def _spent(place: Place) -> float:
    """The dollars of this job so far; 0 where nobody knows."""
    try:
        return PodState.model_validate_json(place.job_dir.state.read_text(encoding="utf-8")).dollars
    except (OSError, ValueError):
        return 0.0


def _bringing_back(orders: Orders, place: Place) -> list[Step]:
    """A machine without the run, as a new pod without a volume is, takes it from where an earlier one has copied it."""
    if orders.sync is None or place.rank > 0 or place.run.checkpoints.exists():
        return []
    address = _address(orders.sync, orders.root)
    return [Step("prepare", (*COPYING, "back", address, str(place.run.path)))]


def last_copy(orders: Orders, place: Place) -> list[Step]:
    """The copy of a run that is over, where one was asked for."""
    if orders.sync is None or place.rank > 0 or not place.run.path.is_dir():
        return []
    return [Step("sync", (*COPYING, "run", str(place.run.path), _address(orders.sync, orders.root)))]


def _address(to: str, root: str) -> str:
    return to if "://" in to else str(Path(root).expanduser().absolute() / to)


def syncing(run: RunDir, to: str) -> tuple[str, ...]:
    """The command that copies a run to an address as it grows, until it is ended."""
    return (sys.executable, "-m", "trainway.storage", str(run.path), to)


def stage_environment(
    orders: Orders, place: Place, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of the stages: the Hub's files on the volume, and how many nodes there are."""
    places, _ = hub_environment(Volume(place.root, place.experiment), environ)
    token, _ = token_environment(environ)
    nodes = {"NUM_NODES": str(orders.nodes)} if orders.nodes > 1 else {}
    rank = {"NODE_RANK": str(place.rank)} if orders.nodes > 1 else {}
    return {**places, **token, **nodes, **rank, **environ}


def _booted(place: Place) -> tuple[str, ...]:
    """The configuration that the boot stages have written, with what no variable of the environment may move."""
    volume = Volume(place.root, place.experiment)
    words = {"name": place.experiment, "run_dir": str(volume.run.path), "data.store_dir": str(volume.cache)}
    return (str(volume.config("yaml")), *(f"{key}={value}" for key, value in words.items()))
