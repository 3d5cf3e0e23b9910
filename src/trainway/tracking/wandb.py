"""Weights & Biases: a row a step, under its own step number; offline, one directory that holds the whole run."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import wandb

from trainway.tracking.target import Row, Target

OFFLINE = ("offline", "dryrun")
INIT_S = 60.0


class WandbTracker:
    """One run of Weights & Biases. W&B takes no step again: what it has, it keeps, and a second sending is none."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.where, self.last_step, self._newest = "", -1, -1
        known = target.recall()
        self._id: str = known.get("id") or target.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._run: wandb.Run | None = None
        offline = target.environ.get("WANDB_MODE", "") in OFFLINE
        if offline and target.finished_at is not None and known.get("closed_at") == target.finished_at:
            self.where, self.last_step = known["directory"], target.finished_at
            return
        target.remember(id=self._id, closed_at=None)
        self._run = run = self._open()
        if run.offline:
            self._remove_other_directory(known.get("directory"), run.settings.sync_dir)
            target.remember(directory=run.settings.sync_dir)
            self.where = run.settings.sync_dir
        else:
            self.where = run.url or ""
            self.last_step = run.step - 1  # the step that W&B asks for next

    def has(self, name: str, step: int) -> bool:
        return step <= self.last_step

    def send(self, rows: list[Row]) -> None:
        assert self._run is not None, "a finished directory is not written to"
        for row in rows:
            self._run.log(row.numbers, step=row.step, commit=True)
            self._newest = row.step

    def close(self, outcome: str) -> None:
        if self._run is None:
            return
        self._run.finish(exit_code=1 if outcome == "failed" else 0)
        if self._target.finished_at is not None or outcome == "done":
            self._target.remember(closed_at=max(self._newest, self.last_step))

    def _open(self) -> wandb.Run:
        target, environ = self._target, self._target.environ
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            # what it would gather by itself is of this process, not of the training
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            allow_val_change=True,
            init_timeout=INIT_S,
        )
        return wandb.init(
            id=self._id,
            resume="allow",
            project=target.project("WANDB_PROJECT"),
            name=target.name if target.tracking.run_name or not environ.get("WANDB_NAME") else None,
            group=target.group,
            tags=target.tags or None,
            config=target.config,
            dir=None if environ.get("WANDB_DIR") else str(target.run.path),
            settings=settings,
        )

    def _remove_other_directory(self, old: str | None, new: str) -> None:
        # its rows are in the new one too, and `wandb sync` of both would show them twice
        if old is None or Path(old) == Path(new):
            return
        name = Path(old).name
        if name.startswith("offline-run-") and name.endswith(f"-{self._id}"):
            shutil.rmtree(old, ignore_errors=True)
