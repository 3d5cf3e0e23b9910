"""The target `local`: a job on this machine, under the same supervisor as on a rented one, detached from the terminal."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.files import atomic_open, atomic_write, disk_faults, hash_file, read_json
from trainway.jobs.orders import JobDir, Orders, PodState
from trainway.jobs.record import Record, records_dir
from trainway.jobs.secrets import secrets_of
from trainway.jobs.target import Cost, Job, JobStatus, MachineState, Say, Stray
from trainway.jobs.waiting import Deadline
from trainway.pod.processes import JOB_MARK, PYTHON, STAGE_MARK, end_all, find_all
from trainway.pod.start import identity

NAME_MARK = "TRAINWAY_LOCAL_JOB"
"""Environment of every process of a local job: its remote name, by which it is found wherever it has gone."""
HOME_MARK = "TRAINWAY_LOCAL_HOME"
"""The same: where the records are that know of it; the jobs of another home are none of ours."""
DOWN_S = 60.0
"""How long `down` leaves a job to save, before it is killed."""
POLL_S = 0.2


class LocalTarget:
    """Jobs on this machine. Nothing of them needs a network, and nothing is left running after `down`."""

    def request(self, job: Job, record: Record) -> Any:
        """The orders, and the command of each node with the variables that it gets; secrets by name alone."""
        job_dir = JobDir.of(job.orders.root, record.name)
        nodes = [
            {"command": _command(job_dir), "env": _node_environment(job.orders, rank, port=0)}
            for rank in range(job.orders.nodes)
        ]
        return {
            "orders": job.orders.model_dump(mode="json", exclude_defaults=True),
            "upload": [
                {"path": item.path, "to": str(_place(job, item.path, item.to))} for item in job.spec.upload
            ],
            "env": dict(job.spec.env),
            "secrets": sorted(job.spec.secrets),
            "nodes": nodes,
        }

    def up(self, job: Job, record: Record, say: Say) -> Record:
        """Start the supervisors, one for each node. Where they run already, nothing happens.

        Raises:
            EnvironmentFault: the root cannot be written, a secret is not set here, or they end at once.
        """
        if find_all(_of(record)):
            say(f"{record.name} runs already")
            return record.with_(phase="up")
        secrets = secrets_of(job.spec)
        # a job that has ended is taken up again: these are new orders
        orders = job.orders.model_copy(update={"token": f"{record.token}-{time.time_ns():x}"})
        job_dir = JobDir.of(orders.root, record.name)
        with disk_faults(job_dir.path):
            job_dir.path.mkdir(parents=True, exist_ok=True)
        job_dir.stop_request.unlink(missing_ok=True)
        job_dir.uploaded.unlink(missing_ok=True)
        for item in job.spec.upload:
            _bring(Path(job.folder) / item.path, _place(job, item.path, item.to), say)
        job_dir.uploaded.touch()
        atomic_write(job_dir.orders, orders.model_dump_json(indent=1) + "\n")
        record = record.with_(phase="up", place={"nodes": orders.nodes})
        port = _free_port()
        started = [
            _start(
                job_dir, record, rank, {**job.spec.env, **secrets, **_node_environment(orders, rank, port)}
            )
            for rank in range(orders.nodes)
        ]
        _see_them_start(job_dir, orders, record, started, say)
        say(f"{record.name} runs here; its files are in {job_dir.path}")
        return record

    def status(self, record: Record) -> JobStatus:
        """What the supervisor has noted, and whether it lives."""
        job_dir = JobDir.of(record.root, record.name)
        state = _state(job_dir)
        machine, detail = _machine(bool(find_all(_of(record))), state)
        count = _node_count(record)
        lines = [_node_line(job_dir.node(rank), rank) for rank in range(count)] if count > 1 else []
        return JobStatus(machine, detail, state, tuple(lines))

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        """The log of each node as it lies on the disk; with several nodes each line begins with its own."""
        job_dir, count = JobDir.of(record.root, record.name), _node_count(record)
        logs = [_Log(job_dir.node(rank).log, f"node {rank}: " if count > 1 else "") for rank in range(count)]
        for log in logs:
            yield from log.new() if tail is None else deque(log.new(), maxlen=tail)
        while follow:
            alive = bool(find_all(_of(record)))  # before reading: what was said until then is read
            lines = [line for log in logs for line in log.new()]
            yield from lines
            if not alive:
                return
            if not lines:
                time.sleep(POLL_S)

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        """A shell, or one command, in the job's root."""
        words = list(command) or [os.environ.get("SHELL", "/bin/sh")]
        try:
            return subprocess.call(words, cwd=Path(record.root))
        except OSError as error:
            raise EnvironmentFault(
                f"{words[0]} cannot be started", error.strerror or "", "correct it"
            ) from None

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        """Nothing is needed: the job's ports are this machine's own."""
        for there in ports.values():
            say(f"the job runs here: http://127.0.0.1:{there}")
        return 0

    def stop(self, record: Record, say: Say) -> Record:
        """Have the training save and end, and wait for it.

        Raises EnvironmentFault when something of it is still there.
        """
        job_dir = JobDir.of(record.root, record.name)
        with disk_faults(job_dir.path):
            job_dir.path.mkdir(parents=True, exist_ok=True)
            job_dir.stop_request.touch()
        say(f"{record.name} is asked to save and to end")
        _end(record, _save_s(job_dir) + DOWN_S)
        state = _state(job_dir)
        say(
            f"{record.name} has stopped; "
            + (f"step {state.saved_step} is saved" if state else "it had not begun")
        )
        return record.with_(phase="stopped")

    def down(self, record: Record, say: Say) -> Record:
        """End what runs, after a minute whatever it does; the run stays as it is.

        Raises EnvironmentFault when something of it is still there.
        """
        if find_all(_of(record)):
            say(f"{record.name} is asked to save and to end")
            _end(record, DOWN_S)
        say(f"{record.name} has ended; its files stay in {record.root}")
        return record.with_(phase="ended", ended=time.time())

    def cost(self, record: Record) -> Cost:
        """Nothing: this machine is yours."""
        end = record.ended or time.time()
        return Cost(hours=max(0.0, end - record.created) / 3600, estimated=0.0, note="this machine")

    def strays(self, records: Sequence[Record]) -> list[Stray]:
        """Jobs of this home that run, and that no record knows or whose record says that they have ended."""
        needed = {r.remote_name for r in records if r.target == "local" and r.phase != "ended"}
        known = {r.remote_name for r in records}
        running: dict[str, int] = {}
        for process in find_all(lambda environ: environ.get(HOME_MARK) == str(records_dir())):
            try:
                name = process.environ().get(NAME_MARK, "")
            except psutil.Error:
                continue
            running.setdefault(name, process.pid)
        why = {True: "its job has ended", False: "no job of this machine is called so"}
        return [
            Stray(name, name, f"running, process {pid}", 0.0, why[name in known])
            for name, pid in sorted(running.items())
            if name not in needed
        ]

    def end_stray(self, stray: Stray) -> None:
        """End all processes of a stray; raises EnvironmentFault when some are still there."""
        if not end_all(lambda environ: environ.get(NAME_MARK) == stray.id, DOWN_S):
            raise _still_there(stray.id)


class _Log:
    """A node's log, read on from where it was read to; lines that are half written wait for their end."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._offset = 0
        self._rest = b""

    def new(self) -> Iterator[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield self._prefix + line.decode("utf-8", "replace").rstrip("\r")


def _command(job_dir: JobDir) -> list[str]:
    return [sys.executable, "-m", "trainway.pod", str(job_dir.orders)]


def _node_environment(orders: Orders, rank: int, port: int) -> dict[str, str]:
    """How the nodes find each other; `port` 0 stands for one that is chosen at the start."""
    if orders.nodes == 1:
        return {}
    values = {"NUM_NODES": orders.nodes, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def _start(job_dir: JobDir, record: Record, rank: int, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One supervisor in a session of its own, which outlives the terminal. Its first words go to the node's log."""
    own = job_dir.node(rank)
    own.path.mkdir(parents=True, exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if name not in (JOB_MARK, STAGE_MARK)}
    # this machine keeps the Hub's files where its user has them
    home = environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))
    environ.setdefault("HF_DATASETS_CACHE", f"{home}/datasets")
    environ |= {**PYTHON, **more, NAME_MARK: record.remote_name, HOME_MARK: str(records_dir())}
    with own.log.open("ab") as log:
        return subprocess.Popen(
            _command(job_dir),
            cwd=Path(record.root),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def _see_them_start(
    job_dir: JobDir, orders: Orders, record: Record, started: Sequence[subprocess.Popen[bytes]], say: Say
) -> None:
    """Wait until every supervisor has taken up the orders.

    Raises EnvironmentFault when one has ended before, or says nothing within `limits.start_minutes`: all are ended then.
    """
    wanted, deadline = identity(orders), Deadline(orders.limits.start_minutes, say)
    for rank, process in enumerate(started):
        own = job_dir.node(rank)
        while True:
            state = _state(own)
            if state is not None and (state.orders == wanted or state.outcome == "done"):
                break
            if process.poll() is not None:
                lines = own.log.read_text("utf-8", "replace").splitlines()
                raise EnvironmentFault(
                    f"the supervisor of node {rank} has ended at once, with exit code {process.returncode}",
                    "; ".join(lines[-3:]),
                    f"see {own.log}",
                )
            if deadline.is_over():
                _end(record, 0.0)
                raise deadline.fault(
                    f"the supervisor of node {rank}",
                    f"process {process.pid} has not taken up its orders",
                    f"it is ended; see {own.log}",
                )
            deadline.tell(f"the supervisor of node {rank}")
            time.sleep(POLL_S)


def _place(job: Job, path: str, to: str) -> Path:
    root = Path(job.orders.root).resolve()
    place = (root / (to or Path(path).name)).resolve()
    if not place.is_relative_to(root):
        raise ConfigError(f"upload: {to} lies outside of the root", f"the root is {root}", "correct `to:`")
    return place


def _bring(source: Path, place: Path, say: Say) -> None:
    """Copy a file or a directory where it is not yet, and compare what has arrived."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        target = place if source.is_file() else place / path.relative_to(source)
        if target.exists() and target.samefile(path):
            continue
        same_size = target.is_file() and target.stat().st_size == path.stat().st_size
        if same_size and hash_file(target) == hash_file(path):
            continue
        with disk_faults(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file, atomic_open(target) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        if hash_file(target) != hash_file(path):
            raise EnvironmentFault(
                f"{target} is not what was copied there",
                "the disk fails, or it was written meanwhile",
                "start again",
            )
    say(f"{source}: {len(files)} file{'s' * (len(files) != 1)} in {place}")


def _of(record: Record) -> Callable[[Mapping[str, str]], bool]:
    return lambda environ: environ.get(NAME_MARK) == record.remote_name


def _end(record: Record, grace_s: float) -> None:
    if not end_all(_of(record), grace_s):
        raise _still_there(record.name)


def _still_there(name: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"some processes of {name} cannot be killed",
        "the kernel waits in them, for a disk or a GPU",
        "look for them with `ps`, and restart the machine when they stay",
    )


def _state(job_dir: JobDir) -> PodState | None:
    try:
        return PodState.model_validate(read_json(job_dir.state))
    except (UserError, ValueError):
        return None


def _machine(alive: bool, state: PodState | None) -> tuple[MachineState, str]:
    if alive:
        return ("running" if state else "starting"), ""
    if state is None or state.outcome is None:
        return "failed", "its supervisor has died; `trainway up` goes on with it"
    return ("stopped" if state.outcome == "stopped" else "gone"), "nothing of it runs"


def _node_line(own: JobDir, rank: int) -> str:
    state = _state(own)
    return f"node {rank}: " + (f"{state.stage}, {state.outcome or 'going on'}" if state else "not heard of")


def _node_count(record: Record) -> int:
    return int(record.place.get("nodes", 1))


def _save_s(job_dir: JobDir) -> float:
    try:
        return Orders.model_validate(read_json(job_dir.orders)).limits.save_minutes * 60
    except (UserError, ValueError):
        return DOWN_S


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
