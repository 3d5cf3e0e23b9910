"""Learning-rate schedules: the factor of the peak rate at each optimiser step."""

from __future__ import annotations

import math

from trainway.config.schema import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at `step`, 1 <= step <= total_steps.

    Linear warm-up from 1 / warmup_steps to 1 at warmup_steps; then cosine or linear down to min_lr_ratio at the last
    step, or constant. A run that ends within its warm-up never leaves it.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.name == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)  # in (0, 1]
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape
