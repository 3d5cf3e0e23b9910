"""TensorBoard event files in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """Writes every number as a scalar of its own name; `first_step` hides what a killed run wrote after it."""

    def __init__(self, directory: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
