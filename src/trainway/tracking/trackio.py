"""Trackio: a row a step, in its local database, on a Space or on a server of its own."""

from __future__ import annotations

import secrets

import trackio
from trackio.sqlite_storage import SQLiteStorage

from trainway.tracking.target import Row, Target


class TrackioTracker:
    """One run of Trackio, which knows it by its name: one that is taken gets a suffix."""

    def __init__(self, target: Target) -> None:
        project = target.project("TRACKIO_PROJECT")
        self._remote = any(target.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        known = target.recall()
        if known.get("project") != project or not known.get("name"):
            target.forget()
            known = {"project": project, "name": self._free_name(project, target.name)}
            target.remember(**known)
        self._run = trackio.init(
            project,
            name=known["name"],
            group=target.group,
            config={**target.config, "tags": target.tags} if target.tags else target.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"project {project}, run {known['name']}"
        self.last_step = self._newest = (
            self._run._next_step - 1
        )  # asked of the database when the run is opened

    def has(self, name: str, step: int) -> bool:
        return step <= self.last_step

    def send(self, rows: list[Row]) -> None:
        for row in rows:
            self._run.log(row.numbers, step=row.step)
            self._newest = row.step

    def close(self, outcome: str) -> None:
        self._run.finish()
        if self._remote:
            return
        # it reports a failed write to nobody
        held = SQLiteStorage.get_max_step_for_run(self._run.project, self._run.name, run_id=self._run.id)
        if (-1 if held is None else held) < self._newest:
            raise OSError(f"its database ends at step {held}")

    def _free_name(self, project: str, name: str) -> str:
        if not self._remote:
            try:
                taken = {run.name for run in trackio.Api().runs(project)}
            except ValueError:
                taken = set()  # there is no such project yet
            if name not in taken:
                return name
        return f"{name}-{secrets.token_hex(3)}"
