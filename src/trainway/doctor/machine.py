"""The machine apart from its GPUs: Python, processors, memory, limits of a process, clocks, what earlier runs left."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainway.checkpoint.lock import lock_holder
from trainway.doctor.findings import Finding, Subject, failure, gib, listed, ok, warning
from trainway.errors import DataError
from trainway.files import read_json
from trainway.run_dir import RunDir

OLDEST_PYTHON = (3, 11)
FEWEST_FILES = 256
ENOUGH_FILES = 4096
"""Open files: a rank holds its shards, sockets of NCCL to all others, and files of the data."""
CLOCK_WARNING_S = 60.0
CLOCK_FAILURE_S = 300.0
"""Signed requests are refused beyond some minutes, and so are certificates at the edges of their time."""
FILE_CLOCK_S = 5.0
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Limits:
    """Soft limits of this process, each None for unlimited; where core dumps would go."""

    open_files: int | None
    locked_memory: int | None
    core_bytes: int | None
    core_pattern: str = "|"


@dataclass(frozen=True)
class Leftover:
    """A process of an earlier run."""

    pid: int
    command: str


def check_python(version: Sequence[int]) -> Iterator[Finding]:
    shown = ".".join(map(str, version[:3]))
    if tuple(version[:2]) < OLDEST_PYTHON:
        yield failure(
            "python",
            f"Python is {shown}",
            "Trainway needs 3.11 or newer",
            "make a virtual environment with a newer one: `python3.11 -m venv .venv`",
        )
    else:
        yield ok("python", f"Python {shown}")


def probe_cores() -> float:
    """Cores that this process may use: of its affinity, and of its container's share."""
    cores = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def check_cores(cores: float, ranks: int) -> Iterator[Finding]:
    if cores < ranks:
        yield warning(
            "cpu",
            f"{cores:g} cores for {ranks} processes",
            "each process prepares its batches and starts its kernels on a core of its own, and waits for it here",
            f"take a machine with at least {2 * ranks} cores, or raise the container's share (docker run --cpus)",
        )
    else:
        yield ok("cpu", f"{cores:g} cores for {ranks} process{'es' * (ranks > 1)}")


def probe_memory() -> int:
    """Bytes of memory that may still be taken, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    return free


def check_memory(free: int, needed: int | None) -> Iterator[Finding]:
    """needed: bytes of the CPU's memory that the plan asks for, or None where it cannot say."""
    if needed is None or needed <= 0.9 * free:
        plan = f", the plan asks for {gib(needed)}" if needed else ""
        yield ok("memory", f"{gib(free)} of memory are free{plan}")
    elif needed <= free:
        yield warning(
            "memory",
            f"{gib(free)} of memory are free, and the plan asks for {gib(needed)}",
            "the libraries and the file cache need some beside it",
            "end other programs, or take a machine with more memory",
        )
    else:
        yield failure(
            "memory",
            f"{gib(free)} of memory are free, and the plan asks for {gib(needed)}",
            "the kernel ends a process that goes beyond, without a word",
            "take a machine with more memory, fewer processes, engine.cpu_offload=none or checkpoint.async_save=false",
        )


def probe_limits() -> Limits:
    def soft(kind: int) -> int | None:
        value = resource.getrlimit(kind)[0]
        return None if value == resource.RLIM_INFINITY else value

    pattern = "|"
    with suppress(OSError):
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return Limits(
        soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_MEMLOCK), soft(resource.RLIMIT_CORE), pattern
    )


def check_limits(limits: Limits, *, infiniband: bool) -> Iterator[Finding]:
    files = limits.open_files
    why = "every rank holds files of the data and sockets to all other ranks"
    if files is not None and files < FEWEST_FILES:
        yield failure("open-files", f"a process may open {files} files", why, "ulimit -n 65536")
    elif files is not None and files < ENOUGH_FILES:
        yield warning("open-files", f"a process may open {files} files", why, "ulimit -n 65536")
    else:
        yield ok("open-files", f"a process may open {'any number of' if files is None else files} files")
    if infiniband and limits.locked_memory is not None:
        yield warning(
            "locked-memory",
            f"a process may lock {gib(limits.locked_memory)} of memory",
            "InfiniBand registers its buffers as locked memory; NCCL fails or falls back to slow sockets without",
            "ulimit -l unlimited; in Docker: --ulimit memlock=-1; in Kubernetes: the capability IPC_LOCK",
        )
    if limits.core_bytes != 0 and not limits.core_pattern.startswith("|"):
        yield warning(
            "core-dumps",
            "a crash writes a core file",
            f"it is as large as the process's memory, and goes to {limits.core_pattern!r} on the disk of the run",
            "ulimit -c 0",
        )


def check_clock(skew_s: float | None, against: str) -> Iterator[Finding]:
    """skew_s: seconds that this clock is ahead of `against`; None where nobody could be asked."""
    if skew_s is None:
        return
    what = f"the clock is {abs(skew_s):,.0f} s {'ahead of' if skew_s > 0 else 'behind'} {against}"
    fix = (
        "have it set: `chronyc makestep` or `timedatectl set-ntp true`, on the host where this is a container"
    )
    if abs(skew_s) >= CLOCK_FAILURE_S:
        why = "signed uploads and certificates are refused at such a distance"
        yield failure("clock", what, why, fix)
    elif abs(skew_s) >= CLOCK_WARNING_S:
        yield warning("clock", what, "logs of several machines cannot be laid beside each other", fix)
    else:
        yield ok("clock", f"the clock agrees with {against} to {abs(skew_s):.0f} s")


def probe_file_clock(folder: Path) -> float:
    """Seconds that this clock is ahead of that of the file system which holds `folder`."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".trainway-doctor-") as file:
        os.utime(file.name)  # the server's time, on a network disk
        return time.time() - os.stat(file.name).st_mtime


def check_file_clock(skew_s: float, folder: Path) -> Iterator[Finding]:
    if abs(skew_s) >= FILE_CLOCK_S:
        yield warning(
            "file-clock",
            f"files in {folder} get a time {abs(skew_s):,.0f} s {'behind' if skew_s > 0 else 'ahead of'} this clock",
            "the file server has another time: which of two files is newer cannot be told",
            "have both clocks set by the same time server",
        )


def probe_leftovers(own: int | None = None) -> list[Leftover]:
    """Processes of this user that train, other than this one, those that it was started by and those it started."""
    own = os.getpid() if own is None else own
    known = {own}
    with suppress(psutil.Error):
        me = psutil.Process(own)
        known |= {process.pid for process in (*me.parents(), *me.children(recursive=True))}
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "uids"]):
        words = process.info["cmdline"] or []
        uids = process.info["uids"]
        if process.info["pid"] not in known and uids and uids.real == os.getuid() and is_training(words):
            found.append(Leftover(process.info["pid"], " ".join(Path(word).name for word in words[:6])))
    return found


def is_training(words: Sequence[str]) -> bool:
    """Whether a command line is that of `trainway train`, of its launcher, or of a rank."""
    if "trainway.launch.agent" in words:
        return True
    places = [number for number, word in enumerate(words[:-1]) if Path(word).name == "trainway"]
    return any(words[place + 1] == "train" for place in places)


def check_leftovers(found: Sequence[Leftover]) -> Iterator[Finding]:
    if found:
        pids = " ".join(str(item.pid) for item in found)
        yield warning(
            "leftovers",
            f"{len(found)} process{'es' * (len(found) > 1)} of another training run here: {listed([item.pid for item in found])}",
            f"they hold memory, ports and GPUs: {found[0].command}",
            f"let them end, or stop them with their work saved: kill {pids}",
        )


def check_run(run: RunDir) -> Iterator[Finding]:
    """Whether another process holds the run directory, or one has left it unfinished."""
    if not run.lock.exists():
        return
    holder = lock_holder(run)
    if holder is not None:
        yield failure(
            "run-lock",
            f"the run {run.path} is in use",
            f"process {holder['pid']} on host {holder['host']} holds it since {holder['time']}",
            "wait for it, stop it, or choose another run_dir",
        )
        return
    try:
        status = read_json(run.status) if run.status.exists() else {}
    except DataError as error:
        status = {"state": error.what}
    if status.get("state") in ("done", "stopped", "failed"):
        yield ok("run-lock", f"{run.path} is free; its last run: {status['state']}")
        return
    yield warning(
        "run-lock",
        f"an earlier run in {run.path} ended without a word",
        f"its lock is there, and nobody holds it (state: {status.get('state', 'not begun')})",
        "nothing to clear: the same command goes on from the last checkpoint; --resume never begins anew",
    )


def has_infiniband(place: Path = INFINIBAND) -> bool:
    return place.is_dir() and any(place.iterdir())


def check_machine(subject: Subject, needed: int | None) -> Iterable[Finding]:
    """Everything here that needs no configuration but a number."""
    yield from check_cores(probe_cores(), subject.ranks)
    yield from check_memory(probe_memory(), needed)
    yield from check_limits(probe_limits(), infiniband=has_infiniband())
    yield from check_leftovers(probe_leftovers())
