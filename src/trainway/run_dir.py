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
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    def stacks(self, rank: int) -> Path:
        """Where the threads of a rank were when the run was found to stand still."""
        return self.path / f"stacks-rank-{rank}.txt"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"
