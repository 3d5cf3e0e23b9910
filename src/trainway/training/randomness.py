"""Every random stream of a step is derived from (seed, step, rank): nothing random needs to be saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed python, numpy and torch for one optimiser step; a resumed run draws what an uninterrupted one drew."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))  # seeds every CUDA device too
