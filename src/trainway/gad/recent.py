"""The figures of a run's last steps, as what watches over it asks for them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

WINDOW = 32
"""Steps that a judgement is over: a fault lasts, and a single step of a few prompts says little."""
TREND = 64
"""Steps whose two halves say whether something grows: lengths double within some hundred steps where they run away."""

ACCURACY, LOSS = "gad/discriminator_accuracy", "gad/discriminator_loss"
LENGTH, TEACHER_LENGTH = "gad/response_length", "gad/teacher_length"
CORRELATION, MARGIN = "gad/score_length_correlation", "gad/margin"
COLLAPSED, TRUNCATED, EMPTY = "gad/collapsed_groups", "gad/truncated", "gad/empty"
KL, ENTROPY = "gad/kl", "gad/entropy"
WATCHED = (
    ACCURACY,
    LOSS,
    LENGTH,
    TEACHER_LENGTH,
    CORRELATION,
    MARGIN,
    COLLAPSED,
    TRUNCATED,
    EMPTY,
    KL,
    ENTROPY,
)


class Recent:
    """The figures of the last steps of one stage, and what of the run's past counts."""

    def __init__(self, stage: str = "", *, best_accuracy: float = 0.0) -> None:
        self.stage = stage
        self.best_accuracy = best_accuracy
        """The discriminator's highest over a window, of the whole run."""
        self.first_entropy: float | None = None
        """The student's at the first step of the stage that has one."""
        self._values: dict[str, deque[float]] = {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Recent:
        recent = cls(state["stage"], best_accuracy=state["best_accuracy"])
        recent.first_entropy = state["first_entropy"]
        recent._values = {name: deque(values, maxlen=TREND) for name, values in state["recent"].items()}
        return recent

    def state(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "best_accuracy": self.best_accuracy,
            "first_entropy": self.first_entropy,
            "recent": {name: list(values) for name, values in self._values.items()},
        }

    def next_stage(self, stage: str) -> Recent:
        return Recent(stage, best_accuracy=self.best_accuracy)

    def take(self, figures: Mapping[str, Any]) -> None:
        """Take in a step's figures; what is absent or no finite number leaves no trace."""
        for name in WATCHED:
            value = figures.get(name)
            if value is not None and math.isfinite(value):
                self._values.setdefault(name, deque(maxlen=TREND)).append(float(value))
        if self.known(ACCURACY):
            self.best_accuracy = max(self.best_accuracy, self.mean(ACCURACY))
        if self.first_entropy is None and ENTROPY in self._values:
            self.first_entropy = self._values[ENTROPY][0]

    def known(self, name: str) -> bool:
        """There is a whole window of it."""
        return len(self._values.get(name, ())) >= WINDOW

    def mean(self, name: str) -> float:
        """Over the last window."""
        return fmean(list(self._values[name])[-WINDOW:])

    def typical(self, name: str) -> float:
        """The median: the mean of what has outliers, as an estimate of a divergence does, is that of the outliers."""
        return median(list(self._values[name])[-WINDOW:])

    def halves(self, name: str) -> tuple[float, float]:
        """Means of the older and the newer half of the last `TREND` steps, or of what there is of them."""
        values = list(self._values[name])
        middle = len(values) // 2
        return fmean(values[:middle]), fmean(values[middle:])

    @property
    def is_adversarial(self) -> bool:
        """The score is the student's reward."""
        return self.stage == "adversarial"

    @property
    def has_trend(self) -> bool:
        return len(self._values.get(LENGTH, ())) == TREND

    @property
    def length_factor(self) -> float:
        """How many times as long as the teacher's the student's answers are."""
        return self.mean(LENGTH) / max(self.mean(TEACHER_LENGTH), 1.0)
