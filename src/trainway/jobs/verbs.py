"""What a user does with a job: up, status, logs, ssh, tunnel, stop, down, cost, reap. One function for each verb."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trainway.checkpoint.lock import directory_lock
from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError
from trainway.jobs.hub import with_release
from trainway.jobs.load import job_name, load_job
from trainway.jobs.quote import Quote, describe, quote, settle
from trainway.jobs.record import (
    Record,
    find_record,
    list_records,
    load_record,
    new_record,
    records_dir,
    save_record,
)
from trainway.jobs.secrets import secrets_of
from trainway.jobs.spec import TargetName
from trainway.jobs.target import Cost, Job, JobStatus, Say, Stray, Target

Confirm = Callable[[str], bool]
"""Shows a text and asks; False means no."""


def target_of(name: TargetName) -> Target:
    """The target of that name; only its own libraries are imported."""
    match name:
        case "local":
            from trainway.jobs.local import LocalTarget

            return LocalTarget()
        case "ssh":
            from trainway.jobs.ssh import SshTarget

            return SshTarget()
        case "runpod":
            from trainway.jobs.runpod.target import RunPodTarget

            return RunPodTarget()
        case "kubernetes":
            from trainway.jobs.kubernetes.target import KubernetesTarget

            return KubernetesTarget()


def dry_run(source: str | Path, overrides: Sequence[str] = (), *, say: Say = lambda line: None) -> Any:
    """Exactly what `up` would send, as JSON-able data; what it would ask is said. Nothing is rented, sent or written.

    Raises as `up` does.
    """
    job, found = _settled(source, overrides)
    say(describe(job, found))
    record = _open_record(job) or _fresh_record(job, str(source))
    return target_of(job.spec.target).request(job, record)


def export_job(
    source: str | Path, folder: str | Path, overrides: Sequence[str] = (), *, trainjob: bool = False
) -> list[Path]:
    """Write a Kubernetes job as files for kubectl and Kustomize instead of creating it.

    trainjob: for Kubeflow Trainer. Raises ConfigError for another target, and as `up` does.
    """
    job, found = _settled(source, overrides)
    if job.spec.target != "kubernetes":
        raise ConfigError(
            f"the target is {job.spec.target}",
            "only Kubernetes takes manifests",
            "use --dry-run to see the request",
        )
    from trainway.jobs.kubernetes.export import export_manifests

    record = _open_record(job) or _fresh_record(job, str(source), found)
    return export_manifests(job, record, Path(folder), trainjob=trainjob)


def up(source: str | Path, overrides: Sequence[str] = (), *, confirm: Confirm, say: Say) -> Record | None:
    """Start a job, or go on with the one that is up under its name; None when the user said no.

    Args:
        confirm: asked once, with the plan's hours and dollars, before anything is rented.

    Raises:
        ConfigError: the job file or the run's configuration is wrong, or the plan is over the job's limits.
        EnvironmentFault: it fits on no candidate, nothing is free, a login is missing, the network fails.
        DataError: something that was to be uploaded is not here.
    """
    job, found = _settled(source, overrides)
    _check_uploads(job)
    with _alone(job.spec.name):
        record = _open_record(job)
        if record is None:
            if not confirm(describe(job, found)):
                return None
            _check_logins(job, say)
            record = _fresh_record(job, str(source), found)
            save_record(record)  # before anything is rented: what is rented is never forgotten
        else:
            say(f"{job.spec.name} is {record.phase} since {_clock(record.created)}: going on with it")
        return target_of(job.spec.target).up(job, record, say)


@dataclass(frozen=True)
class Seen:
    """A job as it is noted here and as it is there."""

    record: Record
    status: JobStatus | None
    """None when the target did not answer."""
    problem: str = ""


def status(words: Sequence[str] = ()) -> list[Seen]:
    """The jobs of these names or files, or all that are not ended. One that cannot be asked does not hide the others."""
    if words:
        records = [load_record(job_name(word)) for word in words]
    else:
        records = [record for record in list_records() if record.phase != "ended"]
    return [_look(record, raises=len(words) == 1) for record in records]


def logs(word: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
    """Lines of all nodes of a job."""
    record = load_record(job_name(word))
    return target_of(record.target).logs(record, follow=follow, tail=tail)


def ssh(word: str, command: Sequence[str] = ()) -> int:
    """A shell, or one command, on the job's first machine; its exit code."""
    record = _living(word)
    return target_of(record.target).ssh(record, command)


def tunnel(word: str, ports: Sequence[str], *, say: Say) -> int:
    """Make ports of the job reachable on 127.0.0.1 until interrupted. `ports`: `6006` or `HERE:THERE`; empty means 6006."""
    record = _living(word)
    pairs = dict(_port_pair(port) for port in ports or ("6006",))
    return target_of(record.target).tunnel(record, pairs, say)


def stop(word: str, *, say: Say) -> Record:
    """Have the training save and end, and stop paying for its GPUs; `up` goes on from there."""
    record = _living(word)
    with _alone(record.name):
        return target_of(record.target).stop(record, say)


def down(word: str, *, say: Say) -> Record:
    """End the job's machine and remove what was made for it, but its volume. Once ended, nothing happens."""
    record = load_record(job_name(word))
    if record.phase == "ended":
        say(f"{record.name} has ended already")
        return record
    with _alone(record.name):
        found = target_of(record.target).down(record, say)
        return found if found.phase == "ended" else found.with_(phase="ended", ended=time.time())


def forget(word: str, *, say: Say) -> Record:
    """Note that a job has ended whose machine is gone and cannot be asked any more; nothing is ended by it."""
    record = load_record(job_name(word))
    say(
        f"{record.name} is noted as ended; nobody was asked: see at {record.target} that nothing of it goes on costing"
    )
    return record.with_(phase="ended", ended=record.ended or time.time())


def cost(words: Sequence[str] = ()) -> list[tuple[Record, Cost]]:
    """What the jobs of these names, or all, have cost."""
    records = [load_record(job_name(word)) for word in words] or list_records()
    return [(record, target_of(record.target).cost(record)) for record in records]


@dataclass(frozen=True)
class Reaped:
    """What `reap` found at one target, and what it could not ask."""

    target: TargetName
    strays: tuple[Stray, ...]
    ended: tuple[str, ...] = ()
    """Ids of those that are gone now."""
    problem: str = ""


def reap(targets: Sequence[TargetName], *, confirm: Confirm, say: Say) -> list[Reaped]:
    """Find machines that Trainway has started and that no job needs, and end them when the user agrees.

    A target that cannot be asked, or a stray that cannot be ended, is told in `problem`; the others are done.
    """
    records = list_records()
    return [_reap_at(name, records, confirm, say) for name in targets]


def reap_targets(words: Sequence[str]) -> tuple[TargetName, ...]:
    """The targets of these names, or those that the jobs of this machine were started at.

    Raises ConfigError for a word that is no target.
    """
    known = get_args(TargetName)
    for word in words:
        if word not in known:
            raise ConfigError(f"{word!r} is no target", f"there are {', '.join(known)}", "correct it")
    used = {record.target for record in list_records()}
    return tuple(name for name in known if name in (words or used))


def _reap_at(name: TargetName, records: Sequence[Record], confirm: Confirm, say: Say) -> Reaped:
    try:
        target = target_of(name)
        strays = tuple(target.strays(records))
    except UserError as error:
        return Reaped(name, (), problem="; ".join(part for part in (error.what, error.why) if part))
    if not strays or not confirm(_stray_text(name, strays)):
        return Reaped(name, strays)
    ended: list[str] = []
    problems: list[str] = []
    for stray in strays:
        try:
            target.end_stray(stray)
        except UserError as error:
            problems.append(f"{stray.id}: {error.what}")
        else:
            ended.append(stray.id)
            say(f"{name}: {stray.name} ({stray.id}) is ended")
    return Reaped(name, strays, tuple(ended), "; ".join(problems))


def _stray_text(name: TargetName, strays: Sequence[Stray]) -> str:
    lines = [f"{name}: {len(strays)} that no job needs"]
    lines += [f"  {s.id}  {s.name}  {s.state}  ${s.dollars_per_hour:.2f} an hour: {s.why}" for s in strays]
    return "\n".join(lines)


def _settled(source: str | Path, overrides: Sequence[str]) -> tuple[Job, Quote]:
    job = load_job(source, overrides)
    found = quote(job)
    return settle(job, found), found


def _open_record(job: Job) -> Record | None:
    """The record of the job that is up, or may be, under this name.

    Raises ConfigError when it is at another target.
    """
    record = find_record(job.spec.name)
    if record is None or record.phase == "ended":
        return None
    if record.target != job.spec.target:
        raise ConfigError(
            f"{job.spec.name} is {record.phase} on {record.target}, and the job file says {job.spec.target}",
            "one name is one job",
            f"end it first: `trainway down {job.spec.name}`; or choose another name",
        )
    return record


def _fresh_record(job: Job, source: str, found: Quote | None = None) -> Record:
    usable = [] if found is None else [o for o in found.usable if o.gpu in job.spec.gpus]
    first = usable[0] if usable else None
    choice = job.spec.gpus[0] if job.spec.gpus else None
    return new_record(
        job.spec.name,
        job.spec.target,
        job_file=str(Path(source).absolute()),
        root=job.orders.root,
        gpu=choice.name if choice else "",
        num_gpus=choice.count * job.spec.nodes if choice else 0,
        dollars_per_hour=job.orders.dollars_per_hour,
        planned_hours=first.hours if first else None,
        planned_dollars=first.dollars if first else None,
        limit_hours=job.orders.limits.hours,
        limit_dollars=job.orders.limits.dollars,
    )


def _check_uploads(job: Job) -> None:
    missing = [item.path for item in job.spec.upload if not (Path(job.folder) / item.path).exists()]
    if missing:
        raise DataError(
            f"{', '.join(missing)}: not there, and the job is to upload {'it' if len(missing) == 1 else 'them'}",
            f"looked for from {job.folder}",
            "correct `upload:`, or bring the files here",
        )


def _check_logins(job: Job, say: Say, environ: Mapping[str, str] = os.environ) -> None:
    """What would stop the job on its first minute there is found here, as far as it can be."""
    spec = job.spec
    secrets_of(spec, environ)
    # imported here: a dry run looks at no login, and is to answer at once
    from trainway.doctor.checks import refuse_logins
    from trainway.doctor.logins import find_token
    from trainway.recipes.volume import TOKEN

    if find_token(environ) is None and TOKEN in spec.secrets:
        say(f"{TOKEN} is known to {spec.target} alone: the machine checks it before it trains")
    else:
        refuse_logins(with_release(job.config, spec.at_end.release), environ)


def _look(record: Record, *, raises: bool) -> Seen:
    try:
        return Seen(record, target_of(record.target).status(record))
    except UserError as error:
        if raises:
            raise
        return Seen(record, None, error.what)


def _living(word: str) -> Record:
    record = load_record(job_name(word))
    if record.phase == "ended":
        raise EnvironmentFault(
            f"{record.name} has ended",
            f"at {_clock(record.ended or 0)}",
            "start it again: `trainway up JOB.yaml`",
        )
    return record


def _port_pair(text: str) -> tuple[int, int]:
    here, colon, there = text.partition(":")
    try:
        pair = int(here), int(there if colon else here)
    except ValueError:
        pair = (0, 0)
    if not all(0 < port < 65536 for port in pair):
        raise ConfigError(f"{text!r} is not a port", "it is PORT or HERE:THERE, from 1 to 65535", "e.g. 6006")
    return pair


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """No second command changes this job meanwhile. Raises EnvironmentFault naming who does."""
    folder = records_dir()
    with directory_lock(folder, folder / f"{name}.lock", what="job", setting="name"):
        yield


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
