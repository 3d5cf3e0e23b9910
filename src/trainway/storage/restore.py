"""A run brought back from its copy: the newest checkpoint that verifies, the best one, metrics and logs."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.checkpoint.lock import run_lock
from trainway.checkpoint.manifest import MANIFEST, read_manifest, verify_files
from trainway.checkpoint.store import CheckpointStore
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_write, disk_faults, fsync_directory, fsync_tree
from trainway.run_dir import RunDir
from trainway.storage.ledger import LEDGER, Ledger, read_ledger
from trainway.storage.retry import Backoff
from trainway.storage.run_files import CHECKPOINTS, POINTERS, local_steps, marker_name, step_of
from trainway.storage.store import Entry, Store, open_store
from trainway.storage.sync import MAX_MARKER_BYTES, read_copies, write_copies
from trainway.storage.transfer import Progress, fetch

UNFINISHED = ".tmp-restore"
"""Ends the name of a checkpoint that is still arriving; the next restore goes on with it, a training removes it."""


@dataclass(frozen=True)
class Restored:
    """step: the training goes on from here; skipped: newer steps whose copies are damaged, and how."""

    step: int | None
    steps: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...]


def find_run(url: str, *, backoff: Backoff | None = None) -> int | None:
    """The newest step that is complete at an address; None when no run was copied there, or none of its checkpoints."""
    store = open_store(url, backoff)
    ledger = read_ledger(store, url)
    return max(_complete(ledger, store.entries(f"{CHECKPOINTS}/")), default=None) if ledger else None


def restore(
    url: str, run_dir: Path, *, progress: Progress | None = None, backoff: Backoff | None = None
) -> Restored:
    """Make `run_dir` what its copy at `url` is, so that `trainway train --resume auto` goes on from it.

    The newest complete checkpoint and the best one are fetched; a damaged one is passed over for the one before. What
    is here already and intact stays. Raises DataError when no run was copied there or no checkpoint of it is intact,
    ConfigError when the run here is further on, EnvironmentFault when it is running, or the store fails.
    """
    url = url.rstrip("/")
    store = open_store(url, backoff)
    ledger = read_ledger(store, url)
    if ledger is None:
        raise DataError(f"{url} holds no run", "there is no list of copies", "correct the address")
    run = RunDir(run_dir)
    with run_lock(run):
        listed = store.entries()
        steps = sorted(_complete(ledger, listed), reverse=True)
        _refuse_newer(run, steps, url)
        fetched = _checkpoints(store, url, ledger, listed, run, steps, progress or _silent)
        for name, entry in sorted(listed.items()):
            if name != LEDGER and not name.startswith(f"{CHECKPOINTS}/"):
                fetch(store, url, name, entry, run.path / name, _noted_hash(ledger, name, entry))
        CheckpointStore(
            run.checkpoints, keep_last=1
        ).clean()  # `latest` and `best`, and what an interruption left
        # last: only a run that is all here may change its copy
        mine = {"generation": ledger.generation + 1, "writer": secrets.token_hex(8)}
        copies = {**read_copies(run.path), url: {"id": ledger.id, "held": list(fetched.steps), **mine}}
        write_copies(run.path, copies, url=url, state="restored", step=fetched.step, error="")
    return fetched


def _complete(ledger: Ledger, listed: Mapping[str, Entry]) -> set[int]:
    steps = {step for step in map(step_of, listed) if step is not None}
    return {step for step in steps if marker_name(step) in listed} - set(ledger.abandoned)


def _noted_hash(ledger: Ledger, name: str, entry: Entry) -> str | None:
    # a pass that was killed may have sent a newer version than it could note: that has the store's own MD5
    copy = ledger.copies.get(name)
    return copy.xxh3 if copy is not None and Entry(copy.size, copy.etag) == entry else None


def _refuse_newer(run: RunDir, steps: list[int], url: str) -> None:
    here = local_steps(run)
    if here and here[-1] > max(steps, default=-1):
        raise ConfigError(
            f"{run.path} is at step {here[-1]}, its copy at {url} at {max(steps, default='none')}",
            "what is here is newer",
            "go on with it, or restore into another directory",
        )


def _checkpoints(
    store: Store,
    url: str,
    ledger: Ledger,
    listed: Mapping[str, Entry],
    run: RunDir,
    steps: list[int],
    progress: Progress,
) -> Restored:
    """The newest of `steps` (descending) that is intact, and the best one."""
    skipped: list[tuple[int, str]] = []
    fetched: list[int] = []
    best = _pointed(store, "best")
    for step in steps:
        if fetched and step != best:
            continue
        try:
            _checkpoint(store, url, listed, run, step, progress)
            fetched.append(step)
        except DataError as error:
            skipped.append((step, error.what))
    if steps and not fetched:
        raise DataError(
            f"no checkpoint at {url} is intact", "; ".join(what for _, what in skipped), "use another copy"
        )
    return Restored(fetched[0] if fetched else None, tuple(sorted(fetched)), tuple(skipped))


def _checkpoint(
    store: Store, url: str, listed: Mapping[str, Entry], run: RunDir, step: int, progress: Progress
) -> None:
    final = run.checkpoints / f"step-{step}"
    data = store.read(marker_name(step), MAX_MARKER_BYTES)
    if data is None:
        raise DataError(f"step-{step}/{MANIFEST}: gone meanwhile")
    if final.is_dir():
        if (final / MANIFEST).is_file() and (final / MANIFEST).read_bytes() == data and not _problems(final):
            return
        shutil.rmtree(final)
    temp = run.checkpoints / f"step-{step}{UNFINISHED}"
    with disk_faults(temp):
        temp.mkdir(parents=True, exist_ok=True)
        atomic_write(temp / MANIFEST, data)
        manifest = read_manifest(temp)
        _files(store, url, listed, temp, step, manifest, progress)
        if problems := verify_files(temp, manifest):
            shutil.rmtree(temp)
            raise DataError(f"step-{step}: {problems[0]}")
        fsync_tree(temp)
        os.rename(temp, final)
        fsync_directory(run.checkpoints)


def _files(
    store: Store,
    url: str,
    listed: Mapping[str, Entry],
    temp: Path,
    step: int,
    manifest: dict[str, Any],
    progress: Progress,
) -> None:
    total, done = sum(entry["size"] for entry in manifest["files"]), 0
    for entry in manifest["files"]:
        name = f"{CHECKPOINTS}/step-{step}/{entry['path']}"
        if name not in listed:
            raise DataError(f"step-{step}/{entry['path']}: missing")
        if listed[name].size != entry["size"]:
            raise DataError(f"step-{step}/{entry['path']}: {listed[name].size} of {entry['size']} bytes")
        fetch(store, url, name, listed[name], temp / entry["path"], entry["xxh3_128"])
        done += entry["size"]
        progress(f"step {step}", done, total)


def _problems(checkpoint: Path) -> list[str]:
    try:
        return verify_files(checkpoint, read_manifest(checkpoint))
    except DataError as error:
        return [error.what]


def _pointed(store: Store, pointer: str) -> int | None:
    assert pointer in POINTERS
    data = store.read(f"{CHECKPOINTS}/{pointer}", 1 << 20)
    return step_of(f"{CHECKPOINTS}/{data.decode('ascii', 'replace').strip()}/x") if data else None


def _silent(label: str, done: int, total: int) -> None:
    pass
