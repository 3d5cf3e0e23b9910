"""Trainway itself on a machine that lacks it: a source tree, a wheel or a requirement in a virtual environment there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainway
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.shell import far_end
from trainway.jobs.shell.connection import Connection
from trainway.jobs.shell.transfer import upload_entries
from trainway.jobs.target import Say

HERE = "."
"""The default of `source`: the source tree that the job file lies in, else the one this program runs from."""
CACHES = {
    ".git",
    ".venv",
    "__pycache__",
    "build",
    "dist",
    "node_modules",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
}
"""What a tree without git is packed without."""


@dataclass(frozen=True)
class Source:
    """What is installed, and how it is known again."""

    what: str
    """For the user."""
    version: str
    """A hash of all of it."""
    folder: Path | None = None
    """Where `entries` are; None for a requirement."""
    entries: tuple[dict[str, Any], ...] = ()
    requirement: str = ""
    """For pip: empty for a tree, else the wheel's name or the requirement."""
    torch: str = ""
    """The exact pin of torch, installed first and alone: a machine without a GPU gets the CPU build where its package
    source has one."""

    def steps(self, place: str, extras: str) -> list[list[str]]:
        """Arguments of `pip install`, in their order; `place` is where the entries are there."""
        if self.folder is None:
            return [[self.requirement]]
        if self.requirement:
            wheel = f"{place}/{self.requirement}"
            # of another build with the same number pip would say that it is there already
            return [[wheel + extras], ["--force-reinstall", "--no-deps", wheel]]
        pinned = ["-c", f"{place}/constraints.txt"] if self.torch else []
        return [*([[self.torch]] if self.torch else []), [*pinned, place + extras]]


def find_source(source: str, folder: str) -> Source:
    """What `source` of a job file means, seen from its `folder`.

    Raises ConfigError when it is no source tree of Trainway's, no wheel and no requirement.
    """
    path = Path(folder) / Path(source).expanduser()
    if path.is_dir():
        if _is_ours(path):
            return _tree(path.resolve())
        if source == HERE:
            return _own_source()
        raise ConfigError(
            f"{path} is no source tree of Trainway", "its pyproject.toml is not ours", "correct `source`"
        )
    if path.suffix == ".whl" and path.is_file():
        entries = far_end.list_tree(str(path.parent), path.name)
        version = far_end.digest(str(path.parent), path.name, path.stat().st_size)
        return Source(path.name, version, path.parent, tuple(entries), path.name)
    if source.startswith(("-", ".", "/", "~")) or source.endswith(".whl"):
        raise ConfigError(
            f"source: {source!r} is not there", "", "name a source tree, a wheel, or a requirement for pip"
        )
    return Source(source, hashlib.sha256(source.encode()).hexdigest(), requirement=source)


def bring(connection: Connection, source: Source, root: str, python: str, extras: str, say: Say) -> str:
    """Install `source` under `root` there, unless it is; the path of the Python that has it.

    Raises EnvironmentFault with pip's last words when it fails; `Connection.run` otherwise.
    """
    venv = f"{root}/trainway-env"
    place = f"{root}/trainway-source/{source.version[:16]}"
    version = f"{source.version} {extras}"
    with connection.far_end() as far:
        if far.ask("read", path=f"{venv}/.trainway") == version:
            say(f"Trainway is there: {source.what}")
            return f"{venv}/bin/python"
    say(f"Trainway comes from {source.what}")
    if source.folder is not None:
        upload_entries(connection, source.folder, source.entries, place, say)
    with connection.far_end() as far:
        far.begin("install", venv=venv, python=python, version=version, steps=source.steps(place, extras))
        while "say" in (told := far.answer()):
            say(told["say"])
    if told["code"] != 0:
        raise EnvironmentFault(
            f"Trainway cannot be installed on {connection.address}",
            told["said"] or f"exit code {told['code']}",
            "see to it there (network, disk, python3-venv), then start the same command again: it goes on",
        )
    return f"{venv}/bin/python"


def _is_ours(path: Path) -> bool:
    try:
        project = tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(project.get("project", {}).get("name") == "trainway")


def _own_source() -> Source:
    tree = Path(trainway.__file__).resolve().parents[2]
    if _is_ours(tree):
        return _tree(tree)
    requirement = f"trainway=={trainway.__version__}"
    return Source(requirement, hashlib.sha256(requirement.encode()).hexdigest(), requirement=requirement)


def _tree(path: Path) -> Source:
    """The files that git knows or would add; without git all but caches."""
    entries = [entry for name in _names(path) for entry in _entry(path, name)]
    seen = hashlib.sha256()
    for entry in entries:
        content = entry.get("link") or far_end.digest(str(path), entry["path"], entry["size"])
        seen.update(f"{entry['path']}\0{entry.get('mode')}\0{content}\n".encode("utf-8", "surrogateescape"))
    constraints = path / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    torch = next((line for line in lines if line.startswith("torch==")), "")
    return Source(str(path), seen.hexdigest(), path, tuple(entries), torch=torch)


def _names(path: Path) -> list[str]:
    command = ["git", "-C", str(path), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
        if listed:
            return sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    except (OSError, subprocess.CalledProcessError):
        pass
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name not in CACHES and not name.endswith(".egg-info")]
        found += [os.path.relpath(os.path.join(folder, name), path) for name in files]
    return sorted(found)


def _entry(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        return far_end.list_tree(str(path), name)
    except FileNotFoundError:  # git still knows what was deleted
        return []
    except far_end.Refused as error:
        raise ConfigError(f"{path} cannot be packed", str(error), "take it out of the tree") from None
