"""Saving checkpoints of a run: all ranks write their part, at once or while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainway.checkpoint.snapshot import Snapshot, Staging, write_snapshot
from trainway.checkpoint.state import STATE_FILE, TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.engines.base import Learner
from trainway.engines.world import World
from trainway.errors import PeerFailed

STUDENT = ""
"""Name of the model that a run is for, whose files lie in a checkpoint's own directory."""


@dataclass
class _Pending:
    """A save whose files are being written."""

    state: TrainState
    directory: Path
    writing: _Task
    """This rank's files."""
    committing: _Task | None = None
    """On rank 0: verify, rename, prune; begun when every rank has written."""


@dataclass
class Saver:
    """Writes the checkpoints of one run.

    With `asynchronous`, `save` returns as soon as a copy of the state has been begun. 1) `before_update` waits until
    the copy is complete 2) a thread on each rank writes its files 3) when `advance` learns from the step's own
    collective that all ranks have, rank 0 publishes the checkpoint in a thread. Until then `latest` is the one before.
    """

    world: World
    learners: Mapping[str, Learner]
    """By the directory, within a checkpoint, that holds what is its: `STUDENT` for the checkpoint itself."""
    store: CheckpointStore
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    """What is saved with each learner's model."""
    asynchronous: bool
    saved: Callable[[TrainState], None]
    """Told on rank 0, in the training's thread, when a checkpoint is published."""
    stalled_s: float = 0.0
    """Seconds for which training has waited for saves."""
    _pending: _Pending | None = None

    def __post_init__(self) -> None:
        self._staging = {name: Staging() for name in self.learners}

    def save(self, state: TrainState) -> None:
        """Save a checkpoint; asynchronous ones may still be written when this returns.

        Raises:
            EnvironmentFault: the disk is full, read-only or failing; the checkpoints before stay as they were.
        """
        self.finish()
        self.world.pulse.enter("checkpoint", long=True)
        with self._stall():
            directory = Path(self.world.from_main(self.world.together(lambda: self._begin(state))))
            if not self.asynchronous:
                self._save_now(state, directory)
                return
            for name, learner in self.learners.items():
                self._staging[name].begin(learner.snapshot())
            writing = _Task("save", lambda: self._write(directory, self._staged, state))
            self._pending = _Pending(state, directory, writing)

    def before_update(self) -> None:
        """Return when the weights may change: a save under way has its copy of them."""
        if self._pending is not None:
            with self._stall():
                for staging in self._staging.values():
                    staging.before_update()

    def progress(self) -> tuple[bool, bool]:
        """(written, failed) on this rank: `advance` takes their sums over all ranks."""
        pending = self._pending
        if pending is None:
            return False, False
        tasks = [task for task in (pending.writing, pending.committing) if task is not None]
        return pending.writing.done, any(task.failure is not None for task in tasks)

    def advance(self, written: float, failed: float) -> None:
        """Take a save under way a step further. Every rank calls it at the same step, with sums over all ranks.

        Raises:
            EnvironmentFault, PeerFailed: writing failed here, or on another rank.
        """
        pending = self._pending
        if pending is None:
            return
        if failed:
            self._fail(pending)
        if written < self.world.world_size:
            return
        if self.world.is_main and pending.committing is None:
            pending.committing = _Task("commit", lambda: self._commit(pending.state, pending.directory))
        elif self.world.is_main and pending.committing is not None and pending.committing.done:
            self.saved(pending.state)
            self._pending = None

    def finish(self) -> None:
        """Wait for a save under way. Every rank calls it together.

        Raises:
            EnvironmentFault, PeerFailed: as `advance`.
        """
        world = self.world
        world.pulse.enter("end of a checkpoint", long=True)
        # ranks other than 0 do not hear of the end of a commit: for them a save is under way until the next one
        (under_way,) = world.sum(self._pending is not None)
        if not under_way:
            return
        pending, self._pending = self._pending, None
        with self._stall():
            try:
                world.together(lambda: pending.writing.wait() if pending else None)
                world.together(lambda: self._finish_commit(pending) if pending and world.is_main else None)
            except BaseException:
                if pending and world.is_main:
                    self.store.abort(pending.directory)
                raise

    @contextmanager
    def _stall(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stalled_s += time.perf_counter() - started

    def _save_now(self, state: TrainState, directory: Path) -> None:
        world = self.world
        try:
            world.together(lambda: self._write(directory, self._snapshot, state))
            world.together(lambda: self._commit(state, directory) if world.is_main else None)
        except BaseException:
            if world.is_main:
                self.store.abort(directory)
            raise
        if world.is_main:
            self.saved(state)

    def _begin(self, state: TrainState) -> str:
        return str(self.store.begin(state.step)) if self.world.is_main else ""

    def _snapshot(self, name: str) -> Snapshot:
        return self.learners[name].snapshot()

    def _staged(self, name: str) -> Snapshot:
        return self._staging[name].result()

    def _write(self, directory: Path, snapshot: Callable[[str], Snapshot], state: TrainState) -> None:
        def write(directory: Path) -> None:
            for name, learner in self.learners.items():
                write_snapshot(snapshot(name), directory / name, learner.model, self.tokenizers[name])
            if self.world.is_main:
                (directory / STATE_FILE).write_text(state.to_json())

        self.store.write_into(directory, write)

    def _commit(self, state: TrainState, directory: Path) -> None:
        best = state.best_step == state.step
        self.store.commit(state.step, directory, best=best, info={"val_loss": state.last_val_loss})

    def _finish_commit(self, pending: _Pending) -> None:
        if pending.committing is None:
            self._commit(pending.state, pending.directory)
        else:
            pending.committing.wait()
        self.saved(pending.state)

    def _fail(self, pending: _Pending) -> None:
        self._pending = None
        if self.world.is_main:
            self.store.abort(pending.directory)
        for task in (pending.writing, pending.committing):
            if task is not None and task.failure is not None:
                raise task.failure
        raise PeerFailed("another rank could not write its part of the checkpoint")


class _Task:
    """Work in a thread that ends with the process: what it leaves half done is removed at the next start."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.failure: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive() and self.failure is None

    def wait(self) -> None:
        """Return when the work is done. Raises what it raised."""
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error
