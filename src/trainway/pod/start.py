"""The first second of a job on its machine: its orders, its place, its secrets, and what an earlier start has left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from trainway.config.schema import Section
from trainway.doctor.findings import is_paid
from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.files import read_json
from trainway.jobs.orders import ORDERS_VARIABLE, JobDir, Orders, PodState
from trainway.launch.dotenv import read_dotenv
from trainway.launch.nodes import NODE_RANK

T = TypeVar("T", bound=Section)
_SAID = re.compile(rb"^\[JOB\] (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ", re.MULTILINE)


def read_orders(path: Path | None, environ: Mapping[str, str] = os.environ) -> Orders:
    """The orders of a file, or of $TRAINWAY_ORDERS.

    Raises ConfigError when there are none or they are not of this version, DataError for a file that is no JSON.
    """
    if path is not None:
        return _validated(Orders, read_json(path), str(path))
    text = environ.get(ORDERS_VARIABLE)
    if not text:
        raise ConfigError(
            "there are no orders",
            f"neither a file is given nor ${ORDERS_VARIABLE} set",
            "`trainway up JOB.yaml` sends them; or `python -m trainway.pod ORDERS.json`",
        )
    try:
        return _validated(Orders, json.loads(text), f"${ORDERS_VARIABLE}")
    except ValueError as error:
        raise ConfigError(
            f"${ORDERS_VARIABLE} is not JSON", str(error), "send it by `trainway up JOB.yaml`"
        ) from None


def node_rank(orders: Orders, environ: Mapping[str, str] = os.environ) -> int:
    """Which of the job's nodes this is. Raises ConfigError when it has several and the environment does not say."""
    if orders.nodes == 1:
        return 0
    said = {name: environ[name] for name in NODE_RANK if environ.get(name)}
    ranks = set(said.values())
    if len(ranks) == 1 and (rank := ranks.pop()).isascii() and rank.isdigit() and int(rank) < orders.nodes:
        return int(rank)
    told = ", ".join(f"{name}={value}" for name, value in said.items()) or "nothing"
    raise ConfigError(
        f"the job has {orders.nodes} nodes, and this one does not know which it is",
        f"the environment says {told}",
        f"set NODE_RANK to a number from 0 to {orders.nodes - 1}",
    )


def make_place(orders: Orders, rank: int, environ: Mapping[str, str] = os.environ) -> JobDir:
    """The directory of this node's files, made if it is missing.

    Raises EnvironmentFault when a rented machine has no volume there, or nothing can be written.
    """
    root = Path(orders.root).expanduser()
    if is_paid(environ) and not root.is_dir():
        raise EnvironmentFault(
            f"there is no directory {root}",
            "the volume is not mounted there: what is written would be lost with the machine",
            "correct `root:` or `volume:` of the job file",
        )
    job_dir = JobDir.of(root, orders.job).node(rank)
    try:
        job_dir.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"the directory {job_dir.path} cannot be made",
            error.strerror or str(error),
            "choose another `root:`, or make this one writable",
        ) from None
    return job_dir


def take_secrets(job_dir: JobDir, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Read the file of secrets into the environment and delete it; the names. A file of KEY=VALUE lines, as a .env.

    Raises ConfigError, which repeats no value; the file is gone then too.
    """
    if not job_dir.secrets.exists():
        return []
    try:
        found = read_dotenv(job_dir.secrets)
    finally:
        job_dir.secrets.unlink(missing_ok=True)
    environ.update(found)
    return list(found)


def identity(orders: Orders) -> str:
    """A hash of the orders, by which a state is known to be theirs."""
    text = json.dumps(orders.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_state(job_dir: JobDir, request: Path, orders: Orders, now: float) -> tuple[PodState, float]:
    """The state to begin with (see `resumed`), and until when a request to stop is answered already.

    request: the file by which the user asks for a stop. A state that is damaged is put aside: the run's own files say how
    far it is, and the log when the job began, so that its limits hold.
    """
    fresh = PodState(job=orders.job, stage="upload", began=now, updated=now, orders=identity(orders))
    if not job_dir.state.exists():
        return fresh, 0.0
    try:
        before = PodState.model_validate(read_json(job_dir.state))
    except (ValueError, UserError) as error:
        with suppress(OSError):
            print(f"{job_dir.state} is damaged, and put aside: {error}", file=sys.stderr, flush=True)
        job_dir.state.replace(job_dir.state.with_name(f"{job_dir.state.name}.damaged"))
        return fresh.model_copy(update={"began": min(now, _first_said(job_dir.log, now))}), 0.0
    answered = 0.0 if before.orders == fresh.orders else before.updated
    return resumed(before, fresh, stop_asked=is_asked(request, answered)), answered


def _first_said(log: Path, otherwise: float) -> float:
    """When the first line of the log with a time was said, in seconds since 1970."""
    try:
        with log.open("rb") as file:
            found = _SAID.search(file.read(1 << 16))
        return datetime.fromisoformat(found[1].decode()).timestamp() if found else otherwise
    except (OSError, ValueError):
        return otherwise


def is_asked(request: Path, answered: float) -> bool:
    """Whether the user has asked for a stop since `answered`, in seconds since 1970."""
    try:
        return request.stat().st_mtime > answered
    except OSError:
        return False


def resumed(before: PodState, fresh: PodState, *, stop_asked: bool) -> PodState:
    """The state to begin with, from the one that an earlier start has left.

    A job that is done stays done, and so does one that has ended otherwise, as long as the orders are the same. Under new
    ones it is taken up again; its clock goes on from where it stood, and the time in between does not count. So is one
    that was stopped without a request of the user's, or that has died: its clock has never stood still.
    """
    if before.outcome == "done":
        return before
    same = before.orders == fresh.orders
    if same and before.outcome is not None and (before.outcome != "stopped" or stop_asked):
        return before
    crashed = before.outcome is None and before.stage == "train"
    used = fresh.updated - max(0.0, before.updated - before.began)
    # a machine whose clock is behind does not give the time back that was used up before
    began = used if not same and before.outcome is not None else min(before.began, used)
    return before.model_copy(
        update={
            "orders": fresh.orders,
            "stage": "upload",
            "outcome": None,
            "reason": "",
            "exit_code": None,
            "began": began,
            "updated": fresh.updated,
            "crashes": (before.crashes + crashed) if same else 0,
            "attempts": before.attempts if same else 0,
            "incomplete": False,
            "machine_ended": False,
        }
    )


def _validated(kind: type[T], content: object, name: str) -> T:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        places = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'all'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise ConfigError(
            f"{name} is not what this version of Trainway understands",
            places,
            "use the same version on both machines",
        ) from None
