"""Files of this machine on to a job's volume, through a pod that only takes them: verified, and whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.kubernetes.cluster import Cluster
from trainway.jobs.kubernetes.shell import BLOCK_BYTES, output, run
from trainway.jobs.orders import JobDir
from trainway.jobs.spec import JobSpec, Upload
from trainway.jobs.target import Job, Say

# Programs for the pod. They are the same for every job: names and sizes are arguments.
_HASH = """
import hashlib, os, sys
if os.path.isfile(sys.argv[1]):
    with open(sys.argv[1], "rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest())
"""
_TAKE = """
import hashlib, os, sys
path, left, expected = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.makedirs(os.path.dirname(path), exist_ok=True)
temp, digest = path + ".tmp-upload", hashlib.sha256()
with open(temp, "wb") as file:
    while left:
        block = sys.stdin.buffer.read1(min(left, 1 << 20))
        if not block:
            sys.exit("the connection ended early")
        file.write(block)
        digest.update(block)
        left -= len(block)
    file.flush()
    os.fsync(file.fileno())
if digest.hexdigest() != expected:
    sys.exit("the file arrived altered")
os.replace(temp, path)
"""
_TOUCH = """
import os, sys
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
open(sys.argv[1], "a").close()
"""


def bring_files(cluster: Cluster, pod: str, job: Job, say: Say) -> None:
    """Bring every file of `spec.upload` that is not there yet, then say so to the job.

    Raises ConfigError for a path that is not here, EnvironmentFault when a file does not arrive as it is.
    """
    root = PurePosixPath(job.orders.root)
    for source, to in planned_files(job.spec, Path(job.folder)):
        _bring(cluster, pod, source, str(root / to), say)
    mark = JobDir.of(job.orders.root, job.spec.name).uploaded
    code, _ = output(cluster, pod, ("python", "-c", _TOUCH, str(mark)))
    if code:
        raise EnvironmentFault(
            f"{mark} could not be written in the pod {pod}", "", "see that the volume is writable"
        )


def planned_files(spec: JobSpec, folder: Path) -> list[tuple[Path, PurePosixPath]]:
    """(file here, its place seen from the volume's root) of all that is to be brought."""
    return [pair for upload in spec.upload for pair in _files(upload, folder)]


def _files(upload: Upload, folder: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    source = folder / Path(upload.path).expanduser()
    to = PurePosixPath(upload.to or source.resolve().name)
    if source.is_file():
        yield source, to
        return
    if not source.is_dir():
        raise ConfigError(
            f"upload: there is no {source}", "", "correct the path: it is seen from the job file"
        )
    for directory, folders, names in os.walk(source):
        folders.sort()
        for name in sorted(names):
            path = Path(directory) / name
            if path.is_file():
                yield path, to / PurePosixPath(path.relative_to(source).as_posix())


def _bring(cluster: Cluster, pod: str, source: Path, to: str, say: Say) -> None:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        code, held = output(cluster, pod, ("python", "-c", _HASH, to))
        if code == 0 and held.decode().strip() == digest:
            say(f"there already: {to}")
            return
        file.seek(0)
        said: list[bytes] = []
        blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
        command = ("python", "-c", _TAKE, to, str(size), digest)
        code = run(cluster, pod, command, out=said.append, err=said.append, feed=blocks)
    if code:
        why = b"".join(said).decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise EnvironmentFault(
            f"{source} did not arrive as {to}", why, "run the same command again: it goes on from here"
        )
    say(f"uploaded: {to}, {size / 2**20:,.1f} MiB")
