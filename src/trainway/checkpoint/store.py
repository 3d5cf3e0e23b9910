"""The checkpoints of a run: written whole or not at all, verified before use, kept to a number, fallen back upon."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.checkpoint.manifest import read_manifest, verify_files, write_manifest
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.files import fsync_directory

log = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMP_MARK = ".tmp-"


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint as a listing shows it; its files are not verified."""

    step: int
    path: Path
    size_bytes: int
    is_latest: bool
    is_best: bool
    info: dict[str, Any] | None
    """What the caller of `save` said about it; None if the manifest cannot be read."""


class CheckpointStore:
    """The directory of one run's checkpoints, `step-N` each, with the links `latest` and `best`.

    A `step-N` exists only when complete. The links are for people: nothing here depends on `latest`, and `clean`
    puts both right after a crash. `begin`, `write_into` and `commit` are the phases of `save` for several ranks.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last is {keep_last}", fix="keep at least 1")
        self.directory = directory
        self.keep_last = keep_last
        self.pinned: set[int] = set()
        """Steps that are kept whatever their age."""

    # ---- writing

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        best: bool = False,
        info: dict[str, Any] | None = None,
    ) -> Path:
        """Save a checkpoint whose files `write` puts, in sub-directories if it likes, into the directory it is given.

        An intact checkpoint of the same step stays as it is; a corrupt one is replaced. Older checkpoints beyond
        keep_last go, the best one and pinned ones excepted. Raises EnvironmentFault if the disk is full, read-only or
        failing; what was there before is untouched then, and the temporary directory is removed.
        """
        temp = self.begin(step)
        try:
            self.write_into(temp, write)
            return self.commit(step, temp, best=best, info=info)
        except BaseException:
            self.abort(temp)
            raise

    def begin(self, step: int) -> Path:
        """Make the temporary directory of a checkpoint (one rank; the others then write into it)."""
        temp = self._temp_name(_name(step))
        with self._write_faults(temp):
            temp.mkdir(parents=True)
        return temp

    def write_into(self, temp: Path, write: Callable[[Path], None]) -> None:
        """Run one rank's `write(temp)`. Raises EnvironmentFault for the disk's errors; then `abort` is due."""
        with self._write_faults(temp):
            write(temp)

    def commit(
        self, step: int, temp: Path, *, best: bool = False, info: dict[str, Any] | None = None
    ) -> Path:
        """Publish a temporary directory (one rank, after a barrier: every rank's files are there). As `save`."""
        final = self.directory / _name(step)
        try:
            with self._write_faults(temp):
                # 1) files, manifest and directories on the disk 2) rename 3) rename on the disk 4) links 5) prune
                write_manifest(temp, step, best=best, info=info or {})
                self._publish(step, temp, final)
                fsync_directory(self.directory)
                self._link("latest", final.name)
                if best:
                    self._link("best", final.name)
                self._prune(saved=step)
        except BaseException:
            self.abort(temp)
            raise
        return final

    def abort(self, temp: Path) -> None:
        """Remove a temporary directory, as far as a failing disk lets it; `clean` removes the rest."""
        shutil.rmtree(temp, ignore_errors=True)

    def clean(self) -> list[str]:
        """Remove what a crash left and set the links right; returns the names removed. Call it under the run lock."""
        if not self.directory.is_dir():
            return []
        removed = []
        with self._write_faults(self.directory):
            for entry in sorted(self.directory.iterdir()):
                if _TEMP_MARK in entry.name:
                    _remove(entry)
                    removed.append(entry.name)
            self._repair_links()
        return removed

    def discard_after(self, step: int) -> list[int]:
        """Remove every checkpoint newer than `step`: the abandoned future of a run that goes on from there.

        Without this, a later resume would find the old future newer than what was trained since.
        """
        newer = [found for found in self.steps() if found > step]
        with self._write_faults(self.directory):
            for found in reversed(newer):  # newest first: a crash midway leaves an unbroken past
                self._retire(found)
            self._repair_links()
        return newer

    def mark_best(self, step: int) -> None:
        """Point `best` at a checkpoint that exists."""
        self._existing(step)
        with self._write_faults(self.directory):
            self._link("best", _name(step))

    # ---- reading

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, intact or not, in ascending order."""
        if not self.directory.is_dir():
            return []
        try:
            with os.scandir(self.directory) as entries:
                found = [_step_of(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise EnvironmentFault(
                f"the checkpoints in {self.directory} cannot be listed",
                f"{error.strerror}",
                "check disk and permissions",
            ) from error
        return sorted(step for step in found if step is not None)

    def info(self, step: int) -> dict[str, Any]:
        """What the caller of `save` said. Raises ConfigError if there is no such step, DataError if it is corrupt."""
        info: dict[str, Any] = read_manifest(self._existing(step))["info"]
        return info

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, one line each, every file hashed; empty when it is intact.

        Raises ConfigError if there is no such step.
        """
        return _verify(self._existing(step))

    def describe(self) -> list[CheckpointInfo]:
        """Every checkpoint in ascending order of step, without hashing."""
        latest, best = self._link_target("latest"), self._link_target("best")
        return [
            CheckpointInfo(step, path, _size_bytes(path), step == latest, step == best, _info_or_none(path))
            for step in self.steps()
            for path in [self.directory / _name(step)]
        ]

    def resolve(self, which: str | int) -> Path:
        """The verified checkpoint: `best`, a step, or `latest`, the highest step whatever the link says.

        Raises ConfigError, listing what there is, if it does not exist; DataError if it is corrupt.
        """
        path = self._existing(self._step_named(which))
        if problems := _verify(path):
            raise DataError(
                f"checkpoint {path} is corrupt",
                _digest(problems),
                f"choose another one; {self._what_exists()}",
            )
        return path

    def newest_intact(self) -> tuple[int, Path, list[tuple[int, list[str]]]] | None:
        """The newest checkpoint that verifies, and the newer ones passed over with their problems.

        None when there is no checkpoint at all. Raises DataError when there are some and none is intact: starting
        again at step 0 without a word would throw the run away.
        """
        skipped: list[tuple[int, list[str]]] = []
        for step in reversed(self.steps()):
            path = self.directory / _name(step)
            problems = _verify(path)
            if not problems:
                return step, path, skipped
            skipped.append((step, problems))
        if not skipped:
            return None
        raise DataError(
            f"no checkpoint in {self.directory} is intact",
            "; ".join(f"step {step}: {_digest(problems)}" for step, problems in skipped),
            "restore one from a copy, or start anew in another run directory",
        )

    # ---- steps of commit

    def _publish(self, step: int, temp: Path, final: Path) -> None:
        if final.is_dir() and not final.is_symlink():
            if not _verify(final):
                shutil.rmtree(temp)  # saved before a restart: what is on the disk is as good, and safe
                return
            self._retire(step)
        os.rename(temp, final)

    def _link(self, link: str, target: str) -> None:
        temp = self._temp_name(link)
        try:
            os.symlink(target, temp)
            os.replace(temp, self.directory / link)
        except BaseException:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise
        fsync_directory(self.directory)

    def _prune(self, saved: int) -> None:
        # by step number: the clock may jump, and copying a run directory changes every time stamp
        steps = self.steps()
        keep = {*steps[-self.keep_last :], *self.pinned, saved, self._link_target("best")}
        for step in steps:
            if step not in keep:
                self._retire(step)

    def _retire(self, step: int) -> None:
        # renamed first: a crash midway must not leave half a checkpoint under a checkpoint's name
        path = self.directory / _name(step)
        doomed = self._temp_name(path.name)
        os.rename(path, doomed)
        fsync_directory(self.directory)
        try:
            shutil.rmtree(doomed)
        except OSError as error:
            # a reader on a network file system can hold it; training need not end for that, and clean() tries again
            log.warning("%s could not be removed: %s", doomed, error.strerror)

    # ---- links and names

    def _repair_links(self) -> None:
        steps = self.steps()
        if steps:
            if self._link_target("latest") != steps[-1]:
                self._link("latest", _name(steps[-1]))
        else:
            _remove(self.directory / "latest")
        # a best checkpoint is better than every earlier one, so the newest flagged one is the best
        best = next((step for step in reversed(steps) if _flagged_best(self.directory / _name(step))), None)
        linked = self._link_target("best")
        if best is not None and (linked not in steps or linked < best):
            self._link("best", _name(best))
        elif linked not in steps:
            _remove(self.directory / "best")

    def _link_target(self, link: str) -> int | None:
        try:
            return _step_of(os.readlink(self.directory / link))
        except OSError as error:
            # any other error must not read as "there is no best checkpoint": pruning would remove it
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return None
            raise

    def _step_named(self, which: str | int) -> int:
        if isinstance(which, int) or which.isdecimal():
            return int(which)
        steps = self.steps()
        if which not in ("latest", "best"):
            raise ConfigError(f"no checkpoint {which!r}", self._what_exists(), "give latest, best or a step")
        step = self._link_target("best") if which == "best" else steps[-1] if steps else None
        if step is None:
            raise ConfigError(
                f"no {which} checkpoint in {self.directory}", self._what_exists(), "give a step"
            )
        return step

    def _existing(self, step: int) -> Path:
        if step not in self.steps():
            raise ConfigError(
                f"no checkpoint of step {step} in {self.directory}",
                self._what_exists(),
                "choose one that exists",
            )
        return self.directory / _name(step)

    def _what_exists(self) -> str:
        steps = self.steps()
        return f"there are steps {', '.join(map(str, steps))}" if steps else "there are no checkpoints"

    def _temp_name(self, name: str) -> Path:
        return self.directory / f"{name}{_TEMP_MARK}{uuid.uuid4().hex[:8]}"

    @contextmanager
    def _write_faults(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _write_fault(path, error) from error


_CURES = {
    errno.ENOSPC: "free some space or lower checkpoint.keep_last",
    errno.EDQUOT: "free some of your quota or lower checkpoint.keep_last",
    errno.EROFS: "have the file system mounted writable",
    errno.EACCES: "make the directory writable",
    errno.EPERM: "make the directory writable",
    errno.EIO: "check the disk, or move the run to another one",
}


def _write_fault(path: Path, error: OSError) -> EnvironmentFault:
    free = ""
    with suppress(OSError):
        existing = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = f" ({shutil.disk_usage(existing).free / 2**30:.2f} GiB free)"
    cure = _CURES.get(error.errno or 0, "put the run directory on another disk")
    return EnvironmentFault(
        f"the checkpoint {path} could not be written",
        f"{error.strerror or error}{free}; the checkpoints saved before are untouched",
        f"{cure}, then start the same command again",
    )


def _name(step: int) -> str:
    if step < 0:
        raise ConfigError(f"step {step} is negative", fix="give a step of 0 or more")
    return f"step-{step}"


def _step_of(name: str) -> int | None:
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _verify(path: Path) -> list[str]:
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [error.what]
    return verify_files(path, manifest)


def _flagged_best(path: Path) -> bool:
    try:
        return bool(read_manifest(path)["best"])
    except DataError:
        return False


def _info_or_none(path: Path) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = read_manifest(path)["info"]
    except DataError:
        return None
    return info


def _size_bytes(path: Path) -> int:
    return sum(
        os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names
    )


def _digest(problems: list[str]) -> str:
    shown = ", ".join(problems[:4])
    return shown if len(problems) <= 4 else f"{shown} and {len(problems) - 4} more"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
