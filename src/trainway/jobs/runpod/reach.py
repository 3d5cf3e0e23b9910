"""The inside of a pod, by SSH: its key as the provider's log shows it, what it knows of itself, what is brought to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.orders import JobDir, PodState
from trainway.jobs.record import Record, find_record
from trainway.jobs.runpod import place
from trainway.jobs.runpod.bootstrap import KEY_MARK
from trainway.jobs.runpod.keys import key_file
from trainway.jobs.runpod.source import READY, UPLOAD, local_source, source_archive, source_words
from trainway.jobs.target import Job, Say
from trainway.planning.measured import state_dir

if TYPE_CHECKING:
    from trainway.jobs.runpod.api import Api
    from trainway.jobs.runpod.models import Pod
    from trainway.jobs.shell.connection import Connection

SSH_MINUTES = 10.0
"""From a running container to one that lets us in."""
ASK_S = 60.0


class Shells(Protocol):
    """How machines are reached; another one in tests."""

    def connect(
        self, *, host: str, port: int, user: str, key: str, host_key: str, known_hosts: Path
    ) -> Connection: ...

    def scan(self, host: str, port: int) -> str: ...

    def state(self, connection: Connection, job_dir: JobDir) -> PodState | None: ...


class OpenSsh:
    """By the ssh of this machine."""

    def connect(
        self, *, host: str, port: int, user: str, key: str, host_key: str, known_hosts: Path
    ) -> Connection:
        from trainway.jobs.shell.connection import Address, Connection

        return Connection(Address(host, port, user, key, host_key), known_hosts)

    def scan(self, host: str, port: int) -> str:
        from trainway.jobs.shell.host_keys import scan_host_key

        return scan_host_key(host, port)

    def state(self, connection: Connection, job_dir: JobDir) -> PodState | None:
        from trainway.jobs.shell.connection import remote_status

        return remote_status(connection, job_dir)


def job_dir(record: Record) -> JobDir:
    return JobDir.of(record.root or "/workspace", record.name)


def reach(api: Api, shells: Shells, record: Record, pod: Pod, say: Say) -> tuple[Record, Connection]:
    """A connection to a running pod, at the port that it has now, to the key that it has shown.

    Raises EnvironmentFault for a pod that cannot be reached from outside yet.
    """
    found = pod.ssh.direct
    if pod.status != "RUNNING" or found is None:
        raise EnvironmentFault(
            f"pod {pod.id} cannot be reached by SSH",
            f"it is {pod.status}" + (", and has no public port" if pod.status == "RUNNING" else ""),
            "wait until it runs, and see its log: `trainway logs`",
        )
    began = f"{pod.id} {pod.started_at.isoformat() if pod.started_at else ''}"
    pins = dict(record.place.get("host_keys", {}))
    if began not in pins:
        pins = {start: key for start, key in pins.items() if start.split()[0] != pod.id}
        pins[began] = _host_key(api, shells, pod, say)
        # what another command has noted meanwhile stays: `status` takes no lock
        now = find_record(record.name)
        record = place.noted(now if now is not None and now.token == record.token else record, host_keys=pins)
    connection = shells.connect(
        host=found.host,
        port=found.port,
        user=found.username,
        key=str(record.place.get("ssh_key") or key_file()),
        host_key=pins[began],
        known_hosts=state_dir() / "ssh" / f"known_hosts-{record.token}-{pod.id}",
    )
    return record, connection


def wait_for_ssh(api: Api, shells: Shells, record: Record, pod: Pod, say: Say) -> tuple[Record, Connection]:
    """As `reach`, waiting until the pod has a port and its sshd lets us in."""
    end_at = api.clock.now() + SSH_MINUTES * 60
    attempt = 0
    while True:
        attempt += 1
        try:
            record, connection = reach(api, shells, record, pod, say)
            done = connection.run(["true"], timeout_s=ASK_S)
            if done.returncode == 0:
                return record, connection
            fault = EnvironmentFault(f"pod {pod.id} runs no command", f"exit code {done.returncode}")
        except EnvironmentFault as error:
            fault = error
        if api.clock.now() >= end_at:
            raise EnvironmentFault(
                fault.what,
                f"{fault.why}, for {SSH_MINUTES:.0f} minutes",
                "see `trainway logs`; the pod goes on costing money: `trainway down` ends it",
            )
        api.clock.sleep(api.clock.backoff(min(attempt, 4)))
        pod = api.find_pod(pod.id) or pod


def inside(api: Api, shells: Shells, record: Record, pod: Pod) -> tuple[Record, PodState | None, str]:
    """What the inside last said, and why it says nothing when it does not."""
    try:
        record, connection = reach(api, shells, record, pod, lambda _: None)
        return record, shells.state(connection, job_dir(record)), ""
    except (EnvironmentFault, ConfigError) as error:
        return record, None, f"{error.what}: {error.why}" if error.why else error.what


def deliver(connection: Connection, job: Job, say: Say) -> None:
    """Bring Trainway's own source and the job's files there; the inside waits for each and then goes on."""
    root = PurePosixPath(job.orders.root)
    own = JobDir.of(str(root), job.orders.job)
    _run(connection, "mkdir", "-p", str(own.path))
    _run(connection, "rm", "-f", str(own.stop_request))  # of an earlier `stop`
    if source_words(job) == UPLOAD and (found := local_source(job)) is not None:
        archive = source_archive(found)
        folder = PurePosixPath(own.path) / "source"
        say(f"bringing Trainway itself there: {archive.name}")
        _run(connection, "mkdir", "-p", str(folder))
        connection.upload(archive, str(folder / archive.name), say)
        _write(connection, str(folder / READY), archive.name)
    for item in job.spec.upload:
        here = Path(job.folder) / Path(item.path).expanduser()
        if not here.exists():
            raise ConfigError(f"upload: {here} is not there", "the job needs it", "correct its path")
        to = root / (item.to or here.resolve().name)
        _run(connection, "mkdir", "-p", str(to.parent))
        connection.upload(here, str(to), say)
    if job.orders.awaits_upload:
        _write(connection, str(own.uploaded), "all\n")


def ask_to_stop(connection: Connection, record: Record) -> None:
    """The inside saves and ends; no restart after it."""
    own = job_dir(record)
    _run(connection, "mkdir", "-p", str(own.path))
    _write(connection, str(own.stop_request), "asked from outside\n")


def wait_until_saved(
    state: Callable[[], PodState | None],
    *,
    now: Callable[[], float],
    sleep: Callable[[float], None],
    minutes: float,
) -> PodState | None:
    """The last word of the inside: that it has ended, or what it had said when the time was up."""
    end_at = now() + minutes * 60
    while True:
        found = state()
        if found is not None and (found.stage in ("end", "ended") or found.machine_ended):
            return found
        if now() >= end_at:
            return found
        sleep(5.0)


def _host_key(api: Api, shells: Shells, pod: Pod, say: Say) -> str:
    """What the bootstrap says its key is, in the log that comes from the provider by https; else the one that is shown
    first, which an attacker between could have put in its place."""
    from trainway.jobs.runpod.api import Lost, Refused
    from trainway.jobs.runpod.logs import pod_log

    said = ""
    try:
        for line in pod_log(api, pod, follow=False, tail=None):
            _, mark, key = line.line.partition(KEY_MARK)
            said = key.strip() if mark else said
    except (Lost, Refused):
        pass
    if said.startswith("ssh-ed25519 "):
        return said
    direct = pod.ssh.direct
    assert direct is not None, "whoever asks has looked"
    found = shells.scan(direct.host, direct.port)
    say("the log does not show the pod's host key: the one that it shows first is pinned")
    return found


def _run(connection: Connection, *command: str) -> None:
    done = connection.run(command, timeout_s=ASK_S)
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EnvironmentFault(
            f"`{command[0]}` failed on the pod",
            words[-1] if words else f"exit code {done.returncode}",
            "see that the volume has room: `trainway ssh`",
        )


def _write(connection: Connection, path: str, text: str) -> None:
    """A small file there, whole or not at all."""
    done = connection.run(["tee", f"{path}.tmp"], input=text.encode(), timeout_s=ASK_S)
    if done.returncode != 0:
        raise EnvironmentFault(
            f"cannot write {path} on the pod", "", "see that the volume has room: `trainway ssh`"
        )
    _run(connection, "mv", "-f", f"{path}.tmp", path)
