"""Every path and file name inside a run directory, and the lock that keeps a second launch out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """The files of one run. Nothing else in Trainway spells these names."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def evaluations(self) -> Path:
        """A directory: one JSON file for each thing that a checkpoint was evaluated on."""
        return self.path / "evaluations"

    @property
    def report_page(self) -> Path:
        return self.path / "report.html"

    @property
    def start(self) -> Path:
        """What was known before the first step: origins of the settings, figures of the data, the plan."""
        return self.path / "start.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def releases(self) -> Path:
        """What has left for the Hub, and what was made ready for that and is not all there yet."""
        return self.path / "releases"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    def stacks(self, rank: int) -> Path:
        """Where the threads of a rank were when the run was found to stand still."""
        return self.path / f"stacks-rank-{rank}.txt"

    def tracker(self, name: str) -> Path:
        """What is remembered of the run at a tracker."""
        return self.path / f"tracker-{name}.json"

    def tracker_lock(self, name: str) -> Path:
        """Held by the one process that feeds the tracker."""
        return self.path / f"tracker-{name}.lock"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"
