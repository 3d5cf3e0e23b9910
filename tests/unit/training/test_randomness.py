"""Random numbers of a step are a function of (seed, step, rank) alone."""

from __future__ import annotations

import random

import numpy as np
import torch

from trainway.training.randomness import seed_step


def draw(seed: int, step: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, step, rank)
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_same_step_draws_the_same() -> None:
    first = draw(42, 10, 1)
    draw(42, 11, 1)
    assert draw(42, 10, 1) == first


def test_every_stream_differs_by_seed_step_and_rank() -> None:
    drawn = [draw(*key) for key in ((42, 10, 1), (43, 10, 1), (42, 11, 1), (42, 10, 0))]
    for stream in zip(*drawn, strict=True):
        assert len(set(stream)) == len(drawn)
