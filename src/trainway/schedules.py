"""Learning-rate schedules: the factor of the peak rate at each optimiser step."""

from __future__ import annotations

import math

from trainway.config.schema import ScheduleConfig
from trainway.planning.geometry import decay_steps, warmup_steps


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at `step`, 1 <= step <= total_steps.

    Linear warm-up from 1 / n to 1 over the n steps of warm-up; then cosine or linear down to min_lr_ratio at the last
    step, or constant, or wsd: 1 until the last `decay_steps`, over which it falls to min_lr_ratio, linearly or as
    1 - sqrt(progress). A run that ends within its warm-up never leaves it.

    Sources of wsd: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4; its sqrt decay: Hägele et al. 2024,
    arXiv 2405.18392, section 3.
    """
    warming = warmup_steps(config, total_steps)
    if step <= warming:
        return step / warming
    if config.name == "constant":
        return 1.0
    falling = total_steps - warming
    if config.name == "wsd":
        falling = decay_steps(config, total_steps)
        if step <= total_steps - falling:
            return 1.0
    progress = (step - (total_steps - falling)) / falling  # in (0, 1]
    if config.name == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.name == "wsd" and config.decay_shape == "sqrt":
        shape = 1.0 - math.sqrt(progress)
    else:
        shape = 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape
