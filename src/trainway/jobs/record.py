"""What this machine knows of the jobs it has started: written before anything is rented, so nothing rented is forgotten."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainway.errors import ConfigError, DataError
from trainway.files import atomic_write, read_json
from trainway.jobs.spec import TargetName
from trainway.planning.measured import state_dir

Phase = Literal["asked", "up", "stopped", "ended"]
"""asked: a request may be under way, and its answer was not seen; up: the machine is ours; ended: it is gone."""


@dataclass(frozen=True)
class Record:
    """One job, as the machine that started it knows it. No secret is in it."""

    name: str
    target: TargetName
    token: str
    """Eight hex digits that make the name unique at the provider: what is found there by it is this job's."""
    created: float
    """Seconds since 1970."""
    phase: Phase = "asked"
    job_file: str = ""
    root: str = ""
    """The volume on the job's machine."""
    gpu: str = ""
    num_gpus: int = 0
    """In all nodes together."""
    dollars_per_hour: float = 0.0
    planned_hours: float | None = None
    planned_dollars: float | None = None
    limit_hours: float | None = None
    """What the machine ends itself after; past it, it is a stray."""
    limit_dollars: float | None = None
    place: dict[str, Any] = field(default_factory=dict)
    """What the target needs to find it again: ids, host, port, namespace."""
    ended: float | None = None

    @property
    def remote_name(self) -> str:
        """The name at the provider."""
        return f"trainway-{self.name}-{self.token}"

    def with_(self, **changes: Any) -> Record:
        """The same with some values changed, saved."""
        found = replace(self, **changes)
        save_record(found)
        return found


def new_record(name: str, target: TargetName, **values: Any) -> Record:
    """A job that is about to be asked for; not saved yet."""
    import secrets

    return Record(name=name, target=target, token=secrets.token_hex(4), created=time.time(), **values)


def records_dir() -> Path:
    """$TRAINWAY_HOME/jobs, else ~/.cache/trainway/jobs."""
    return state_dir() / "jobs"


def save_record(record: Record) -> None:
    """Keep the record, in place of an older one of the same name."""
    import json

    path = _path(record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(asdict(record), indent=1) + "\n")


def find_record(name: str) -> Record | None:
    """The job of that name, or None. Raises DataError for a file that is damaged."""
    path = _path(name)
    return _read(path) if path.is_file() else None


def load_record(name: str) -> Record:
    """The job of that name. Raises ConfigError naming those that are known, DataError for a file that is damaged."""
    found = find_record(name)
    if found is None:
        known = ", ".join(record.name for record in list_records()) or "none"
        raise ConfigError(
            f"there is no job {name!r}", f"known here are: {known}", "start one: `trainway up JOB.yaml`"
        )
    return found


def list_records() -> list[Record]:
    """All jobs that this machine has started and not forgotten, the oldest first."""
    directory = records_dir()
    found = [_read(path) for path in sorted(directory.glob("*.json"))] if directory.is_dir() else []
    return sorted(found, key=lambda record: record.created)


def forget_record(name: str) -> None:
    """Drop what is known of a job that is gone."""
    _path(name).unlink(missing_ok=True)


def _path(name: str) -> Path:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,43}[a-z0-9])?", name):
        raise ConfigError(
            f"{name!r} is not the name of a job", "small letters, digits and dashes, at most 45", "correct it"
        )
    return records_dir() / f"{name}.json"


def _read(path: Path) -> Record:
    content = read_json(path)
    try:
        return Record(**content)
    except TypeError as error:
        raise DataError(
            f"{path}: not a job's record",
            str(error),
            "see what runs with `trainway reap`, then remove the file",
        ) from None
