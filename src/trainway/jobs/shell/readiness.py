"""Whether a machine will do for a job, before anything is sent there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs.shell.command import Address
from trainway.jobs.target import Job

GIB = 2**30
FRESH_GIB = {"gpu": 12, "cpu": 3}
"""Room of a fresh environment and what pip unpacks for it: torch with CUDA is the most of it."""

Uploads = Sequence[tuple[Path, str]]
"""(file or directory here, path under the root there)"""


def uploads(job: Job) -> Uploads:
    """What the job brings along. Raises DataError for what is not here, ConfigError for a place outside."""
    found = []
    for item in job.spec.upload:
        here = Path(job.folder) / Path(item.path).expanduser()
        if not here.exists():
            raise DataError(f"upload: {here} is not there", "", "correct the path, seen from the job file")
        to = PurePosixPath(item.to or here.resolve().name)
        if to.is_absolute() or ".." in to.parts or not to.parts:
            raise ConfigError(
                f"upload.to: {item.to!r} leads out of the root", "", "a path seen from the job's root"
            )
        found.append((here, str(to)))
    return found


def fitting_python(job: Job, facts: Mapping[str, Any], address: Address) -> str:
    """The newest Python there that will do. Raises EnvironmentFault when there is none, or GPUs are missing."""
    wanted = min((gpu.count for gpu in job.spec.gpus), default=0)
    if len(facts["gpus"]) < wanted:
        raise EnvironmentFault(
            f"{address} shows {len(facts['gpus'])} GPUs, and the job wants {wanted}",
            ", ".join(facts["gpus"]) or "nvidia-smi lists none there",
            "correct `gpus:`, or see to the driver there",
        )
    good = [found for found in facts["pythons"] if (found[1], found[2]) >= (3, 11)]
    able = [found for found in good if found[3]]
    if able:
        return str(max(able, key=lambda found: (found[1], found[2]))[0])
    if good:
        version = f"{good[0][1]}.{good[0][2]}"
        raise EnvironmentFault(
            f"Python {version} on {address} makes no virtual environments",
            "its venv module is not installed",
            f"there: apt-get install python{version}-venv",
        )
    seen = ", ".join(f"{major}.{minor}" for _, major, minor, _ in facts["pythons"])
    raise EnvironmentFault(
        f"there is no Python 3.11 or newer on {address}",
        f"there are {seen}" if seen else "there is none at all",
        "there: apt-get install python3.11 python3.11-venv",
    )


def check_room(job: Job, facts: Mapping[str, Any], address: Address) -> None:
    """Raises EnvironmentFault when the root there cannot be written, or has no room for what comes first."""
    if not facts["writable"]:
        raise EnvironmentFault(
            f"{facts['root']} cannot be written on {address}",
            "",
            "choose another `root:`, or its owner's login",
        )
    data = sum(
        file.stat().st_size
        for here, _ in uploads(job)
        for file in ([here] if here.is_file() else here.rglob("*"))
        if file.is_file()
    )
    fresh = 0 if facts["installed"] else FRESH_GIB["gpu" if facts["gpus"] else "cpu"] * GIB
    if facts["free"] < data + fresh:
        raise EnvironmentFault(
            f"{address} has {facts['free'] / GIB:.1f} GiB free at {facts['root']}",
            f"the upload takes {data / GIB:.1f} GiB, Trainway and its libraries {fresh / GIB:.0f} GiB",
            "free some space there, or choose a `root:` on another disk",
        )
