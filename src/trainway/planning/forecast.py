"""How long a whole run takes and what it costs, from the times of its parts (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainway.config.schema import RunConfig

Basis = Literal["measured", "modelled"]


@dataclass(frozen=True)
class Forecast:
    """A run from its beginning to its end."""

    steps: int
    steps_s: float
    evaluations: int
    """The one before the first step included."""
    evaluation_s: float
    """Of one of them, its samples included."""
    evaluation_basis: Basis
    saves: int
    save_s: float
    """For which one save holds the training up."""
    last_save_s: float
    """Until the last one is on the disk."""
    save_bytes: int
    save_basis: Basis
    start_s: float
    """From the start of the program to the first step, the data being prepared already."""
    gpus: int
    """GPUs that are paid for; on a CPU, machines."""
    gpu_price: float | None
    """USD of one of them for an hour."""

    @property
    def training_s(self) -> float:
        """Steps, evaluations and saves."""
        saves = self.save_s * (self.saves - 1) + self.last_save_s if self.saves else 0.0
        return self.steps_s + self.evaluations * self.evaluation_s + saves

    @property
    def seconds(self) -> float:
        return self.start_s + self.training_s

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.gpu_price is None else self.hours * self.gpus * self.gpu_price


def count_events(
    config: RunConfig, total_steps: int, steps_per_epoch: int | None, ends: Sequence[int] = ()
) -> tuple[int, int]:
    """(evaluations, saves) of a run. `ends`: last steps of stages, each of which is saved.

    What is saved is evaluated too, and there is an evaluation before the first step.
    """
    checkpoint = config.checkpoint
    saves = {total_steps, *ends, *range(checkpoint.save_every, total_steps + 1, checkpoint.save_every)}
    if checkpoint.save_each_epoch and steps_per_epoch is not None and config.recipe != "gad":
        saves |= {*range(steps_per_epoch, total_steps + 1, steps_per_epoch)}
    every = config.eval.every
    return 1 + len(saves | {*range(every, total_steps + 1, every)}), len(saves)


def checkpoint_bytes(total: int, trainable: int, *, lora: bool) -> int:
    """About what a checkpoint of a model takes: fp32 weights, of adapters those alone, and the optimiser's two moments."""
    return 4 * (trainable if lora else total) + 8 * trainable
