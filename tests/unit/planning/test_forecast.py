"""How often a run evaluates and saves, and what its parts add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.config.test_load import load
from trainway.planning.forecast import Forecast, checkpoint_bytes, count_events


def by_the_loop(total: int, every: int, save_every: int, epoch: int | None, ends: tuple[int, ...]) -> Any:
    """What the loops do, step by step."""
    saves = evaluations = 0
    for step in range(1, total + 1):
        save = step % save_every == 0 or step == total or step in ends
        save = save or (epoch is not None and step % epoch == 0)
        saves += save
        evaluations += save or step % every == 0
    return 1 + evaluations, saves


@pytest.mark.parametrize(
    ("total", "every", "save_every", "epoch"),
    [(100, 10, 25, None), (100, 30, 40, None), (7, 10, 10, None), (100, 7, 11, 13), (1, 1, 1, None)],
)
def test_events_are_counted_as_the_loop_has_them(
    total: int, every: int, save_every: int, epoch: int | None
) -> None:
    words = [f"eval.every={every}", f"save_every={save_every}", f"save_each_epoch={epoch is not None}"]
    config = load("m3_medium", words)
    assert count_events(config, total, epoch) == by_the_loop(total, every, save_every, epoch, ())


def test_the_end_of_a_stage_is_saved() -> None:
    config = load("m3_medium", ["eval.every=50", "save_every=60"])
    assert (
        count_events(config, 100, None, ends=(33, 100)) == by_the_loop(100, 50, 60, None, (33, 100)) == (5, 3)
    )


FORECAST = Forecast(
    steps=100, steps_s=3000.0, evaluations=5, evaluation_s=60.0, evaluation_basis="modelled", saves=3, save_s=20.0,
    last_save_s=50.0, save_bytes=1, save_basis="measured", start_s=210.0, gpus=8, gpu_price=3.0,
)  # fmt: skip


def test_a_forecast_adds_up() -> None:
    assert FORECAST.training_s == 3000 + 5 * 60 + 2 * 20 + 50
    assert FORECAST.seconds == 3600
    assert FORECAST.hours == 1.0
    assert FORECAST.dollars == 24.0
    assert replace(FORECAST, gpu_price=None).dollars is None
    assert replace(FORECAST, gpu_price=0.0).dollars == 0.0


def test_a_checkpoint_of_adapters_holds_no_model() -> None:
    assert checkpoint_bytes(1000, 1000, lora=False) == 12_000
    assert checkpoint_bytes(1000, 10, lora=True) == 120
