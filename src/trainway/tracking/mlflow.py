"""MLflow: metrics by name and step, parameters and tags, on a server, in a database file or on Databricks."""

from __future__ import annotations

import hashlib
import posixpath
import re
import secrets
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import get_tracking_uri

from trainway.masking import mask_tokens
from trainway.tracking.target import Row, Target

KEY_TAG = "trainway.key"
MOST_METRICS, MOST_PARAMS = 1000, 100
"""Of one request: MLflow's own limits."""
LONGEST_NAME, LONGEST_VALUE = 250, 6000
STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """One run of MLflow. It is asked for the newest step of every metric, and sent what comes after."""

    def __init__(self, target: Target) -> None:
        self._target = target
        # without MLFLOW_TRACKING_URI a run stays where the working directory of its first launch said
        uri = target.environ.get("MLFLOW_TRACKING_URI") or target.recall().get("uri") or _default_uri()
        self._client = MlflowClient(tracking_uri=uri)
        run = self._find(uri) or self._create(uri)
        self._id, self._began_ms = run.info.run_id, int(run.info.start_time or 0)
        self.where = f"{mask_tokens(uri)} experiment {run.info.experiment_id} run {self._id}"
        self._newest = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
        self.last_step = max(self._newest.values(), default=-1)
        self._log_params(run)
        if target.finished_at is None and run.info.status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")

    def has(self, name: str, step: int) -> bool:
        return step <= self._newest.get(metric_name(name), -1)

    def send(self, rows: list[Row]) -> None:
        # The time follows from the run's own seconds: a request that was lost on its way back is sent again as it
        # was, and MLflow keeps one of equal points.
        points = [
            Metric(metric_name(name), float(value), self._began_ms + int(1000 * row.seconds), row.step)
            for row in rows
            for name, value in row.numbers.items()
        ]
        for first in range(0, len(points), MOST_METRICS):
            self._client.log_batch(self._id, metrics=points[first : first + MOST_METRICS])

    def close(self, outcome: str) -> None:
        if outcome != "running" and self._client.get_run(self._id).info.status != STATUS[outcome]:
            self._client.set_terminated(self._id, status=STATUS[outcome])

    def _find(self, uri: str) -> Run | None:
        """The run of an earlier launch, also one whose id never came back."""
        known = self._target.recall()
        if known.get("uri") != mask_tokens(uri) or "key" not in known:
            return None
        if "id" in known:
            try:
                return self._client.get_run(known["id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        found = self._client.search_runs(
            [known["experiment"]], f"tags.`{KEY_TAG}` = '{known['key']}'", max_results=1
        )
        return self._named(found[0]) if found else None

    def _create(self, uri: str) -> Run:
        target, key = self._target, secrets.token_hex(8)
        experiment = target.environ.get("MLFLOW_EXPERIMENT_ID") if not target.tracking.project else None
        experiment = experiment or self._experiment(target.project("MLFLOW_EXPERIMENT_NAME"))
        target.forget()
        target.remember(uri=mask_tokens(uri), experiment=experiment, key=key)
        tags = {KEY_TAG: key, **{metric_name(tag): "true" for tag in target.tags}}
        if target.group:
            tags["trainway.group"] = target.group
        return self._named(self._client.create_run(experiment, tags=tags, run_name=target.name))

    def _named(self, run: Run) -> Run:
        self._target.remember(id=run.info.run_id)
        return run

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException as error:
            found = self._client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return str(found.experiment_id)  # another run made it at the same moment

    def _log_params(self, run: Run) -> None:
        # MLflow refuses to change one: they are the settings that the run began with
        params = [
            Param(metric_name(key), value[:LONGEST_VALUE])
            for key, value in self._target.flat_config().items()
            if metric_name(key) not in run.data.params
        ]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])
        description = self._target.config.get("description")
        if description and "mlflow.note.content" not in run.data.tags:
            self._client.log_batch(self._id, tags=[RunTag("mlflow.note.content", str(description))])


def _default_uri() -> str:
    """MLflow's own default, from wherever it is read later."""
    kind, separator, path = str(get_tracking_uri()).partition(":///")
    return f"{kind}{separator}{Path(path).resolve()}" if kind == "sqlite" else f"{kind}{separator}{path}"


def metric_name(name: str) -> str:
    """The name as MLflow takes it: itself, or, where it holds what MLflow refuses, a like one that is as unique."""
    fitting = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    if posixpath.normpath(fitting) != fitting or fitting == "." or fitting.startswith(("..", "/")):
        fitting = re.sub(r"[/.]", "_", fitting)
    if fitting == name and 0 < len(name) <= LONGEST_NAME:
        return name
    return f"{fitting[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
