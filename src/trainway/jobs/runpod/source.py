"""Where the Trainway on a pod comes from: pip, or an archive of this machine's own source."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import tomllib
from pathlib import Path

import trainway
from trainway.errors import ConfigError
from trainway.files import atomic_write
from trainway.jobs.target import Job
from trainway.planning.measured import state_dir

UPLOAD = "upload"
READY = "READY"
"""Beside what was uploaded, holding its name; there once it is whole."""
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?([=<>!~]=?=?[A-Za-z0-9.*+!,<>=~-]+)?"
)
_ADDRESS = re.compile(r"(https://|git\+https://)[^\s@]+(@[A-Za-z0-9._/-]+)?(#[^\s]*)?")
_PARTS = ("pyproject.toml", "README.md", "LICENSE", "src")


def source_words(job: Job) -> str:
    """What the pod is told: a requirement or an address for pip, or `upload`. Raises ConfigError for neither."""
    if local_source(job) is not None:
        return UPLOAD
    word = job.spec.source
    if word == ".":  # the default, and no source tree is there
        return f"trainway=={trainway.__version__}"
    if _REQUIREMENT.fullmatch(word) or _ADDRESS.fullmatch(word):
        return word
    raise ConfigError(
        f"source is {word!r}",
        "it is no source tree of Trainway's, no wheel that is there, and nothing that pip would install",
        "e.g. `source: ../trainway`, `source: dist/trainway-1.0-py3-none-any.whl` or `source: trainway==1.0`",
    )


def local_source(job: Job) -> Path | None:
    """The wheel or source tree here that the job names; the tree that this program runs from, for the default."""
    named = Path(job.folder) / Path(job.spec.source).expanduser()
    if named.suffix == ".whl" and named.is_file():
        return named
    here = Path(trainway.__file__).resolve().parents[2]
    trees = (named, here) if job.spec.source == "." else (named,)
    return next((tree for tree in trees if _is_ours(tree)), None)


def source_archive(source: Path) -> Path:
    """A file that pip installs: the wheel itself, or an archive of what the tree needs to be built, made here once."""
    if source.is_file():
        return source
    packed = io.BytesIO()
    # without times and owners the same source has the same name, and is not sent twice
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for file in _files(source):
            entry = tarfile.TarInfo(f"trainway/{file.relative_to(source).as_posix()}")
            entry.size, entry.mode = file.stat().st_size, 0o644
            with file.open("rb") as content:
                tar.addfile(entry, content)
    data = packed.getvalue()
    path = state_dir() / "sources" / f"trainway-{hashlib.sha256(data).hexdigest()[:16]}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        atomic_write(path, data)
    return path


def _files(tree: Path) -> list[Path]:
    found: list[Path] = []
    for part in _PARTS:
        path = tree / part
        inside = path.rglob("*") if path.is_dir() else [path]
        found += [file for file in inside if file.is_file() and "__pycache__" not in file.parts]
    return sorted(found)


def _is_ours(tree: Path) -> bool:
    try:
        told = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return told.get("project", {}).get("name") == "trainway" and (tree / "src" / "trainway").is_dir()
