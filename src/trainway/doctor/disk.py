"""The disks: room, speed, whether they can be written, and whether what lies there survives the machine."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainway.doctor.findings import PAID_VARIABLE, POD_VARIABLE, Finding, failure, gib, listed, ok, warning
from trainway.recipes.volume import ERASED

SHM = Path("/dev/shm")
SHM_DEFAULT = 64 << 20
"""What Docker gives a container."""
SHM_ENOUGH = 1 << 30
LEAST_FREE = 10 << 30
"""Without a configuration: less is too little for any model."""
FEW_INODES = 10_000
FEWEST_INODES = 200
PROBE_BYTES = 16 << 20
SLOW_MB_S = 50.0
IN_MEMORY = ("tmpfs", "ramfs")
PROBE_PREFIX = ".trainway-doctor-"


@dataclass(frozen=True)
class Need:
    """Bytes that something will write below a directory."""

    path: Path
    what: str
    num_bytes: int
    note: str = ""
    """What is not in `num_bytes`, in words."""


@dataclass(frozen=True)
class Mount:
    """The file system that holds a path."""

    point: str
    kind: str


@dataclass(frozen=True)
class Room:
    """Free bytes and inodes of a file system; inodes None where it makes them as needed."""

    device: int
    free: int
    inodes: int | None


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists: nothing is ever created."""
    place = path.expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())


def check_shared_memory(size: int | None, ranks: int, gpus: int) -> Iterator[Finding]:
    """size: bytes of /dev/shm, None where there is none."""
    if size is None:
        return
    what = f"/dev/shm has {gib(size)}"
    fix = "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory at /dev/shm; or mount -o remount,size=16g /dev/shm"
    if ranks > 1 and gpus > 1 and size <= SHM_DEFAULT:
        why = f"NCCL keeps the buffers between {ranks} processes there, and fails without room"
        yield failure("shared-memory", what, why, fix)
    elif ranks > 1 and size < SHM_ENOUGH:
        yield warning("shared-memory", what, f"{ranks} processes exchange data through it", fix)
    else:
        yield ok("shared-memory", what)


def probe_size(path: Path = SHM) -> int | None:
    """Bytes of the file system at `path`; None where it is not there."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def probe_room(path: Path) -> Room:
    place = existing(path)
    found = os.statvfs(place)
    # some file systems count no inodes: they make them as needed
    return Room(
        place.stat().st_dev, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
    )


def check_room(needs: Sequence[Need]) -> Iterator[Finding]:
    """Needs on one file system are added up."""
    groups: dict[int, list[Need]] = {}
    rooms: dict[int, Room] = {}
    for need in needs:
        room = probe_room(need.path)
        groups.setdefault(room.device, []).append(need)
        rooms[room.device] = room
    for device, group in groups.items():
        yield from judge_room(rooms[device], group)


def judge_room(room: Room, group: Sequence[Need]) -> Iterator[Finding]:
    total = sum(need.num_bytes for need in group)
    places = listed(list(dict.fromkeys(str(need.path) for need in group)))
    notes = [need.note for need in group if need.note]
    parts = "; ".join([*(f"{need.what} {gib(need.num_bytes)}" for need in group if need.num_bytes), *notes])
    fix = "free some space, choose run_dir, data.store_dir and HF_HOME on a larger disk, or lower checkpoint.keep_last"
    if total > room.free:
        yield failure(
            "disk-space", f"{places}: {gib(room.free)} are free, {gib(total)} are needed", parts, fix
        )
    elif total > 0.9 * room.free or (not total and room.free < LEAST_FREE):
        why = parts or "a model, its checkpoints and the prepared data have to find room"
        yield warning(
            "disk-space", f"{places}: {gib(room.free)} are free, about {gib(total)} are needed", why, fix
        )
    else:
        needed = "; ".join([f", about {gib(total)} are needed" if total else "", *notes])
        yield ok("disk-space", f"{places}: {gib(room.free)} are free{needed}")
    if room.inodes is None:
        return
    what = f"{places}: {room.inodes:,} more files can be made"
    why = "checkpoints, caches and logs are many small files, and a disk without inodes counts as full"
    fix = "remove directories of many small files (caches, old environments: `du --inodes -x / | sort -n | tail`)"
    if room.inodes < FEWEST_INODES:
        yield failure("inodes", what, why, fix)
    elif room.inodes < FEW_INODES:
        yield warning("inodes", what, why, fix)


def check_writable(paths: Mapping[str, Path]) -> Iterator[Finding]:
    """paths: {setting: directory}; of one that is not there yet, its nearest parent counts."""
    written = []
    for setting, path in paths.items():
        place = existing(path)
        try:
            with tempfile.NamedTemporaryFile(dir=place, prefix=PROBE_PREFIX) as file:
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
            written.append(str(path))
        except OSError as error:
            yield failure(
                "writable",
                f"{setting}: {path} cannot be written",
                f"{place}: {error.strerror}",
                f"choose another {setting}; or make it writable: `mount -o remount,rw` or `chown` of {place}",
            )
    if written:
        yield ok("writable", f"{listed(written)} can be written")


def probe_speed(
    folder: Path, *, num_bytes: int = PROBE_BYTES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """MB/s at which a file is written and synced below `folder`."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=PROBE_PREFIX) as file:
        began = clock()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / 1e6 / max(clock() - began, 1e-9)


def check_speed(mb_s: float, folder: Path, checkpoint_bytes: int | None) -> Iterator[Finding]:
    """checkpoint_bytes: of one checkpoint, as far as it is known."""
    takes = ""
    if checkpoint_bytes and checkpoint_bytes > mb_s * 1e6:
        takes = f"; a checkpoint of {gib(checkpoint_bytes)} takes about {math.ceil(checkpoint_bytes / 1e6 / mb_s):,} s"
    what = f"{folder} is written at {mb_s:,.0f} MB/s{takes}"
    if mb_s < SLOW_MB_S:
        yield warning(
            "disk-speed",
            what,
            "every save holds the GPUs up for so long",
            "put run_dir on a local or faster volume, save less often (checkpoint.save_every), or set checkpoint.async_save=true",
        )
    else:
        yield ok("disk-speed", what)


def probe_mount(path: Path, table: Path = Path("/proc/self/mountinfo")) -> Mount:
    """The file system that holds `path`, or its nearest parent that exists."""
    place = existing(path).resolve()
    best = Mount("/", "")
    with suppress(OSError):
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            point = before.split()[4].replace("\\040", " ")
            # of mounts at one place the last counts
            if place.is_relative_to(point) and len(point) >= len(best.point):
                best = Mount(point, after.split()[0])
    return best


def check_survives(path: Path, mount: Mount, environ: Mapping[str, str], *, paid: bool) -> Iterator[Finding]:
    """Whether what a run writes is still there when the machine is gone (X6)."""
    place = path.expanduser().absolute()
    reason = _passing(place, mount, on_pod=bool(environ.get(POD_VARIABLE)), paid=paid)
    fix = "put run_dir on the volume, e.g. run_dir=/workspace/runs/NAME (TRAINWAY_RUNS_DIR=/workspace/runs)"
    if reason and paid:
        fix += f"; {PAID_VARIABLE}=0 goes on regardless"
        yield failure("survives", f"{path} does not survive this machine", reason, fix)
    elif reason:
        yield warning("survives", f"{path} does not survive a restart", reason, "put run_dir on a disk")
    else:
        yield ok("survives", f"{path} lies on {mount.kind or 'a disk'} at {mount.point}")


def _passing(place: Path, mount: Mount, *, on_pod: bool, paid: bool) -> str:
    """Why what lies there is lost; empty when it is not."""
    if mount.kind in IN_MEMORY:
        return f"{mount.point} is kept in memory ({mount.kind})"
    if not paid:
        return ""
    if mount.kind == "overlay" or (on_pod and mount.point == "/"):
        return f"{mount.point} is the container's own disk, which is erased when the pod stops"
    # a volume that is mounted there is no part of the container's disk
    for name in ERASED:
        if place.is_relative_to(name) and not Path(mount.point).is_relative_to(name):
            return f"{name} is erased when the pod stops"
    return ""


def check_survival(paths: Iterable[Path], environ: Mapping[str, str], *, paid: bool) -> Iterator[Finding]:
    for path in paths:
        yield from check_survives(path, probe_mount(path), environ, paid=paid)
