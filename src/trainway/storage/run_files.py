"""A run directory as a copy sees it: which checkpoints are complete, which files grow, which names are for people."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from trainway.checkpoint.manifest import MANIFEST, read_manifest
from trainway.errors import DataError
from trainway.run_dir import RunDir
from trainway.storage.transfer import plain_files

CHECKPOINTS = "checkpoints"
POINTERS = ("latest", "best")
STATE = "sync.json"
"""In the run directory: what the copying of it last did, and which copy is this run's."""

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_GROWING = (".jsonl", ".txt", ".log")


@dataclass(frozen=True)
class LocalCheckpoint:
    """A complete checkpoint here."""

    step: int
    path: Path
    manifest: dict[str, Any]
    """As `read_manifest` gives it."""
    marker: bytes
    """The manifest's own bytes, whose arrival makes the copy complete."""

    @property
    def marker_xxh3(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.marker)


def marker_name(step: int) -> str:
    """The object that makes a copied checkpoint complete."""
    return f"{CHECKPOINTS}/step-{step}/{MANIFEST}"


def step_of(name: str) -> int | None:
    """The step of the checkpoint that an object belongs to."""
    parts = name.split("/")
    match = _STEP.fullmatch(parts[1]) if len(parts) > 2 and parts[0] == CHECKPOINTS else None
    return int(match[1]) if match else None


def local_checkpoints(run: RunDir) -> dict[int, LocalCheckpoint]:
    """Every complete checkpoint whose manifest can be read, by step. Its files are hashed only when they are sent."""
    found: dict[int, LocalCheckpoint] = {}
    for step in local_steps(run):
        path = run.checkpoints / f"step-{step}"
        try:
            marker = (path / MANIFEST).read_bytes()
            found[step] = LocalCheckpoint(step, path, read_manifest(path), marker)
        except (DataError, OSError):
            continue  # pruned at this moment, or damaged: neither is worth a copy
    return found


def local_steps(run: RunDir) -> list[int]:
    """Steps that have a checkpoint's directory, in ascending order."""
    if not run.checkpoints.is_dir():
        return []
    matches = (
        _STEP.fullmatch(entry.name)
        for entry in os.scandir(run.checkpoints)
        if entry.is_dir(follow_symlinks=False)
    )
    return sorted(int(match[1]) for match in matches if match)


def linked_step(run: RunDir, link: str) -> int | None:
    """The step that `latest` or `best` points to here."""
    try:
        match = _STEP.fullmatch(os.readlink(run.checkpoints / link))
    except OSError:
        return None
    return int(match[1]) if match else None


def other_files(run: RunDir, unsafe: set[str]) -> dict[str, int]:
    """Bytes to copy of each file that is no checkpoint's: of one that grows, up to the end of its last whole line.

    Names that no copy could have are put into `unsafe`: one odd file must not keep the checkpoints from being copied.
    """
    found = {}
    for name, size in plain_files(run.path, unsafe).items():
        # what was made ready for the Hub is a checkpoint once more
        if name.startswith((f"{CHECKPOINTS}/", f"{run.releases.name}/")) or name in (run.lock.name, STATE):
            continue
        found[name] = whole_lines(run.path / name, size) if grows(name) else size
    return found


def grows(name: str) -> bool:
    """Whether a file is appended to; the others are replaced as a whole."""
    return name.endswith(_GROWING)


def whole_lines(path: Path, size: int) -> int:
    """The bytes of the first `size` that are whole lines; of a file that vanishes, 0."""
    block = 1 << 16
    try:
        with open(path, "rb") as file:
            end = size
            while end > 0:
                start = max(0, end - block)
                file.seek(start)
                cut = file.read(end - start).rfind(b"\n")
                if cut >= 0:
                    return start + cut + 1
                end = start
    except FileNotFoundError:
        pass
    return 0


def kept_checkpoints(run: RunDir) -> int:
    """How many of the newest checkpoints the run keeps, as its configuration says; 1 when it cannot be read."""
    try:
        keep = yaml.safe_load(run.config.read_text(encoding="utf-8"))["checkpoint"]["keep_last"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return 1
    return keep if type(keep) is int and keep > 0 else 1
