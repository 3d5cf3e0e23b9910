"""Jobs on any machine with SSH: a server of one's own, or one rented anywhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.orders import JobDir, Orders
from trainway.jobs.record import Record, load_record, records_dir
from trainway.jobs.secrets import secrets_of
from trainway.jobs.shell.command import Address, ConnectionLost
from trainway.jobs.shell.connection import Connection, FarEnd, remote_logs, state_of
from trainway.jobs.shell.environment import Source, bring, find_source
from trainway.jobs.shell.far_job import MARK
from trainway.jobs.shell.host_keys import fingerprint, pinned_host_key, scan_host_key
from trainway.jobs.shell.readiness import check_room, fitting_python, uploads
from trainway.jobs.target import Cost, Job, JobStatus, MachineState, Say, Stray

SPARE_S = 120.0
"""Beyond the time that the job's file gives the training to save: the last copy of the run."""
LOOK_S = 1.0
KILL_LOOKS = 30
"""After so many looks, what the kernel does not give back is left behind."""
SAY_S = 15.0


class SshTarget:
    """The verbs of `trainway.jobs.target.Target` over SSH. It keeps nothing: all is in the record, and there."""

    def request(self, job: Job, record: Record) -> Any:
        """What `up` would do there, and with which files; the machine's home is only known there."""
        root = job.orders.root
        source = _source(job)
        orders = f"{root}/jobs/{record.name}/orders.json"
        return {
            "host": _address(job).host,
            "user": job.spec.ssh.user,
            "port": job.spec.ssh.port,
            "host_key": job.spec.ssh.host_key or _pinned(record) or "asked for once, and pinned",
            "source": {"what": source.what, "version": source.version},
            "install": source.steps(f"{root}/trainway-source/{source.version[:16]}", _extras(job)),
            "upload": [{"from": str(here), "to": f"{root}/{to}"} for here, to in uploads(job)],
            "command": [f"{root}/trainway-env/bin/python", "-m", "trainway.pod", orders],
            "env": {**job.spec.env, MARK: record.remote_name},
            "secrets": sorted(job.spec.secrets),
            "orders": job.orders.model_dump(mode="json"),
        }

    def up(self, job: Job, record: Record, say: Say) -> Record:
        """Bring what is missing there, and start; a job that runs there is left as it is.

        Raises:
            ConfigError: the job file asks for what this target cannot do.
            DataError: something that was to be uploaded is not here.
            EnvironmentFault: the machine cannot be reached, is another one than before, or lacks something.
        """
        address = _address(job)
        secrets = secrets_of(job.spec)
        record = record.with_(
            place={
                "host": address.host,
                "port": address.port,
                "user": address.user,
                "key": address.key,
                "end_command": list(job.spec.ssh.end_command),
                "save_s": job.orders.limits.save_minutes * 60 + SPARE_S,
            }
        )
        connection = _first_connection(record, address, say)
        with connection.far_end() as far:
            facts = far.ask("machine", root=job.orders.root)
            root = facts["root"]
            record = record.with_(root=root)
            place = JobDir.of(root, record.name)
            seen = far.ask("look", **_where(place, record))
        if seen["held"]:
            say(f"{record.name} runs on {address} already: nothing is started")
            return record.with_(phase="up", ended=None)
        python = fitting_python(job, facts, address)
        source = _source(job)
        check_room(job, facts, address)
        python = bring(connection, source, root, python, _extras(job), say)
        for here, to in uploads(job):
            say(f"upload: {here} to {to}")
            connection.upload(here, f"{root}/{to}", say)
        # under a new token a job that was stopped, or has failed, is taken up again
        orders = job.orders.model_copy(update={"root": root, "token": f"{record.token}-{time.time_ns():x}"})
        self._start(connection, orders, record, python, {**job.spec.env, **secrets}, say)
        return record.with_(phase="up", ended=None)

    def _start(
        self,
        connection: Connection,
        orders: Orders,
        record: Record,
        python: str,
        variables: Mapping[str, str],
        say: Say,
    ) -> None:
        """Secrets go through stdin into the environment of the supervisor alone: into no file and no command line."""
        place = JobDir.of(orders.root, record.name)
        with connection.far_end() as far:
            far.ask("write", path=str(place.uploaded), text="")
            told = far.ask(
                "start",
                command=[python, "-m", "trainway.pod", str(place.orders)],
                cwd=orders.root,
                variables={**variables, MARK: record.remote_name},
                orders=str(place.orders),
                text=orders.model_dump_json(indent=1) + "\n",
                stop=str(place.stop_request),
                lock=str(place.lock),
                log=str(place.path / "supervisor.log"),
            )
        if told.get("code") not in (None, 0):
            raise EnvironmentFault(
                f"{record.name} ended at once on {connection.address}, with exit code {told['code']}",
                told["said"].strip() or f"see {place.log} there",
                "correct what it says, then start the same command again",
            )
        say(
            f"{record.name} runs on {connection.address}; this machine may go: `trainway logs {record.name} -f`"
        )

    def status(self, record: Record) -> JobStatus:
        """A machine that does not answer is `unknown`; one that is not ours raises."""
        place = _place(record)
        try:
            seen = _connection(record).ask("look", **_where(place, record))
        except ConnectionLost as error:
            return JobStatus("unknown", f"{error.what}: {error.why}")
        pod = state_of(seen["state"], f"{record.place['host']}: {place.state}")
        supervised = seen["held"] or any(one["supervisor"] for one in seen["processes"])
        state: MachineState
        if supervised:
            state, detail = "running", ""
        elif pod is None:
            state, detail = ("failed", "it was never heard of") if record.phase == "up" else ("starting", "")
        elif pod.outcome is None:
            state, detail = "failed", "its supervisor is gone: `trainway up` starts it again"
        else:
            state, detail = "stopped", pod.reason
        if not supervised and (left := len(seen["processes"])):
            detail = "; ".join(
                part for part in (detail, f"{left} processes are left: `trainway down`") if part
            )
        return JobStatus(state, detail, pod)

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of the job's log."""
        return remote_logs(_connection(record), _place(record), follow=follow, tail=tail)

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        """A shell there, or one command."""
        return _connection(record).interactive(command)

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        """Make ports of the machine's 127.0.0.1 reachable on ours."""
        for here, there in ports.items():
            say(f"http://127.0.0.1:{here} is port {there} of {record.place['host']}; Ctrl-C ends it")
        return _connection(record).forward(ports)

    def stop(self, record: Record, say: Say) -> Record:
        """Ask the training to save and end, and wait until it has. Raises EnvironmentFault when it takes too long."""
        if not self._end(record, say):
            raise EnvironmentFault(
                f"{record.name} has not ended within {record.place['save_s'] / 60:g} minutes",
                "it may still be saving",
                f"see `trainway logs {record.name}`; `trainway down {record.name}` kills it",
            )
        return record.with_(phase="stopped")

    def down(self, record: Record, say: Say) -> Record:
        """End all that the job has started there, see that it is gone, then end the machine if the job file says how."""
        if not record.root:  # no machine has let us in yet, so nothing was started
            say(f"nothing of {record.name} was started")
            return record.with_(phase="ended", ended=time.time())
        if not self._end(record, say):
            say(f"{record.name} has not ended in time: it is killed")
        connection = _connection(record)
        with connection.far_end() as far:
            _kill(far, record.remote_name)
        say(f"nothing of {record.name} runs on {connection.address}")
        if command := record.place.get("end_command"):
            self._end_machine(connection, command, say)
        return record.with_(phase="ended", ended=time.time())

    def _end(self, record: Record, say: Say) -> bool:
        """Whether the supervisor has ended by itself after it was asked to."""
        place = _place(record)
        with _connection(record).far_end() as far:
            if (
                far.ask("end", mark=record.remote_name, stop=str(place.stop_request), signal=signal.SIGTERM)
                == 0
            ):
                say(f"{record.name} does not run there")
                return True
            say(f"{record.name} is asked to save and end")
            began = said = time.monotonic()
            while time.monotonic() - began < record.place["save_s"]:
                seen = far.ask("look", **_where(place, record))
                if not seen["held"] and not any(one["supervisor"] for one in seen["processes"]):
                    pod = state_of(seen["state"], str(place.state))
                    say(f"{record.name} has ended" + (f" at step {pod.step}" if pod else ""))
                    return True
                if time.monotonic() - said >= SAY_S:
                    said = time.monotonic()
                    say(f"waiting for {record.name} to save ({said - began:.0f} s)")
                time.sleep(LOOK_S)
        return False

    def _end_machine(self, connection: Connection, command: Sequence[str], say: Say) -> None:
        try:
            done = connection.run(command, timeout_s=300)
        except ConnectionLost:  # the machine goes, and the line with it
            say(f"{connection.address} was told to end, and the line is cut")
            return
        if done.returncode != 0:
            raise EnvironmentFault(
                f"the command that ends {connection.address} failed: `{command[0]}`",
                done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}",
                "end the machine at its provider, and correct ssh.end_command",
            )
        say(f"{connection.address} was told to end")

    def cost(self, record: Record) -> Cost:
        """By the clock since `up` and the price of the job file: who rents out the machine is not known here."""
        hours = ((record.ended or time.time()) - record.created) / 3600
        price = record.dollars_per_hour
        note = (
            "by the clock and the job file's price"
            if price
            else "the job file names no price for this machine"
        )
        return Cost(hours, hours * price, None, note)

    def strays(self, records: Sequence[Record]) -> list[Stray]:
        """Supervisors on the machines of known jobs that no known job needs. A machine that is off has none."""
        mine = [record for record in records if record.target == "ssh" and record.place]
        known = {record.remote_name: record for record in mine}
        found: dict[str, Stray] = {}
        asked = set()
        for record in mine:
            machine = (record.place["host"], record.place["port"], record.place["user"])
            if machine in asked or _pinned(record) is None:
                continue
            asked.add(machine)
            try:
                seen = _connection(record).ask("processes", mark=None)
            except ConnectionLost:
                continue
            for mark in sorted({one["mark"] for one in seen}):
                job = known.get(mark)
                if job is None:
                    why = "no job known here is called so; another computer may have started it"
                elif job.phase == "ended":
                    why = "its job has ended"
                else:
                    continue
                stray = f"{mark}@{record.name}"
                found[stray] = Stray(stray, mark, "running", job.dollars_per_hour if job else 0.0, why)
        return list(found.values())

    def end_stray(self, stray: Stray) -> None:
        """Ask it to save and end; what is left is killed. Raises EnvironmentFault when that does not help either."""
        mark, _, name = stray.id.rpartition("@")
        record = load_record(name)
        with _connection(record).far_end() as far:
            far.ask("end", mark=mark, stop=None, signal=signal.SIGTERM)
            end = time.monotonic() + float(record.place["save_s"])
            while any(one["supervisor"] for one in far.ask("processes", mark=mark)):
                if time.monotonic() > end:
                    break
                time.sleep(LOOK_S)
            _kill(far, mark)


def _kill(far: FarEnd, mark: str) -> None:
    """SIGKILL to all that bears the mark of a job, and see that it is gone. Raises EnvironmentFault naming what is not."""
    for _ in range(KILL_LOOKS):
        if far.ask("end", mark=mark, stop=None, signal=signal.SIGKILL) == 0:
            return
        time.sleep(LOOK_S)
    if left := far.ask("processes", mark=mark):
        raise EnvironmentFault(
            f"processes of {mark} cannot be killed on {far.where}",
            f"the kernel still has {', '.join(str(one['pid']) for one in left)}",
            "see to them there, then try again",
        )


def _address(job: Job) -> Address:
    ssh = job.spec.ssh
    if ssh.host is None:
        raise ConfigError("ssh.host is not set", "the target ssh needs a machine", "add `ssh: {host: ...}`")
    if job.spec.nodes != 1:
        raise ConfigError(
            f"nodes is {job.spec.nodes}", "the target ssh is one machine", "use nodes: 1, or another target"
        )
    key = str((Path(job.folder) / Path(ssh.key).expanduser()).absolute()) if ssh.key else None
    return Address(ssh.host, ssh.port, ssh.user, key, ssh.host_key)


def _known_hosts(record: Record) -> Path:
    return records_dir() / f"{record.name}.known_hosts"


def _pinned(record: Record) -> str | None:
    return pinned_host_key(_known_hosts(record))


def _first_connection(record: Record, address: Address, say: Say) -> Connection:
    """Pin the machine's key: the one given, else the one it shows now, which is said."""
    known_hosts = _known_hosts(record)
    if address.host_key is None and pinned_host_key(known_hosts) is None:
        Connection(address, known_hosts)  # refuses what is no host before anything is asked
        found = scan_host_key(address.host, address.port)
        say(
            f"{address} shows {found.split()[0]} {fingerprint(found)}: pinned for {record.name}; compare it there"
        )
        address = Address(address.host, address.port, address.user, address.key, found)
    return Connection(address, known_hosts)


def _connection(record: Record) -> Connection:
    place = record.place
    if not place or _pinned(record) is None:
        raise EnvironmentFault(
            f"{record.name} has not come to a machine yet",
            "`up` ended before",
            "start it again: `trainway up`",
        )
    return Connection(
        Address(place["host"], place["port"], place["user"], place["key"]), _known_hosts(record)
    )


def _place(record: Record) -> JobDir:
    return JobDir.of(record.root, record.name)


def _where(place: JobDir, record: Record) -> dict[str, str]:
    return {"state": str(place.state), "lock": str(place.lock), "mark": record.remote_name}


def _source(job: Job) -> Source:
    return find_source(job.spec.source, job.folder)


def _extras(job: Job) -> str:
    places = (job.spec.sync or "", job.spec.at_end.release.to or "")
    wanted = [
        extra
        for scheme, extra in (("s3://", "s3"), ("gs://", "gcs"))
        if any(p.startswith(scheme) for p in places)
    ]
    return f"[{','.join(wanted)}]" if wanted else ""
