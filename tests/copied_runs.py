"""Run directories to copy, made in no time, and stores that die or lie at a chosen moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from trainway.checkpoint.manifest import read_manifest, verify_files
from trainway.checkpoint.store import CheckpointStore
from trainway.run_dir import RunDir
from trainway.storage.run_files import marker_name, step_of
from trainway.storage.store import Content, DirectoryStore, Entry


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class DyingStore(DirectoryStore):
    """A directory whose user is killed at its operation number `dies_at`, before or after that is done."""

    def __init__(self, folder: Path, dies_at: int | None = None, *, after: bool = False) -> None:
        super().__init__(folder)
        self.dies_at, self.after, self.operations = dies_at, after, 0

    def put(self, name: str, content: Content) -> Entry:
        self._die(before=True)
        entry = super().put(name, content)
        self._die(before=False)
        return entry

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._die(before=True)
            super().delete([name])
            self._die(before=False)

    def _die(self, *, before: bool) -> None:
        self.operations += before
        if self.operations == self.dies_at and before != self.after:
            raise Killed


class ToyRun:
    """A run directory as training leaves it: metrics that grow, a checkpoint now and then, old ones pruned."""

    def __init__(self, path: Path, keep_last: int = 2, size: int = 2000) -> None:
        self.dir, self.size = RunDir(path), size
        path.mkdir(parents=True, exist_ok=True)
        self.dir.config.write_text(yaml.safe_dump({"checkpoint": {"keep_last": keep_last}}))
        self.store = CheckpointStore(self.dir.checkpoints, keep_last)

    def train(self, step: int, *, best: bool = False, salt: str = "") -> None:
        """Metrics up to `step`, then its checkpoint."""
        with self.dir.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 1 / step}) + "\n")

        def write(folder: Path) -> None:
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_bytes(f"{step}{salt} ".encode() * self.size)
            (folder / "optimizer.safetensors").write_bytes(f"moments {step}{salt}".encode() * self.size)

        self.store.save(step, write, best=best, info={"step": step})


def complete_steps(folder: Path) -> set[int]:
    """Steps whose copy in a directory says that it is complete; every one of them must be intact, byte for byte."""
    names = DirectoryStore(folder).entries()
    steps = {step for step in map(step_of, names) if step is not None and marker_name(step) in names}
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step}"
        assert verify_files(checkpoint, read_manifest(checkpoint)) == []
    return steps


def same_run(left: Path, right: Path) -> None:
    """Assert that two run directories hold the same, lock and state of the copying aside."""
    assert contents(left) == contents(right)


def contents(folder: Path) -> dict[str, Any]:
    aside = ("sync.json", "run.lock")
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file() and name not in aside:
            found[name] = path.read_bytes()
    return found
