"""Steps that are not taken: decided by the same numbers on every rank, counted, bounded, remembered."""

from __future__ import annotations

import json
import math

import pytest

from trainway.config.schema import TrainConfig
from trainway.errors import UserError
from trainway.training.guard import StepGuard


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)]
)
def test_nonfinite_step_is_left_out_and_counted(loss: float, norm: float) -> None:
    guard = StepGuard(TrainConfig())
    assert guard.accept(1, 2.0, 1.0)
    assert not guard.accept(2, loss, norm)
    assert guard.accept(3, 2.0, 1.0)
    assert (guard.skipped, guard.skipped_in_a_row) == (1, 0)


def test_policy_stop_ends_at_once() -> None:
    with pytest.raises(UserError, match="step 7"):
        StepGuard(TrainConfig(on_nonfinite="stop")).accept(7, math.nan, 1.0)


def test_steps_left_out_in_a_row_are_bounded() -> None:
    guard = StepGuard(TrainConfig(max_skipped_steps=3))
    assert not guard.accept(1, math.nan, 1.0)
    assert not guard.accept(2, math.nan, 1.0)
    with pytest.raises(UserError, match="stopped at step 3"):
        guard.accept(3, math.nan, 1.0)


def test_spike_against_the_recent_median() -> None:
    guard = StepGuard(TrainConfig(spike_factor=10.0))
    assert guard.accept(1, 2.0, 1000.0)  # nothing to compare with yet
    for step in range(StepGuard.WINDOW):
        assert guard.accept(step, 2.0, 1.0)
    assert guard.accept(80, 2.0, 9.9)
    assert not guard.accept(81, 2.0, 100.0)
    assert guard.accept(82, 2.0, 1.1)  # the spike did not become the new usual


def test_state_survives_json() -> None:
    guard = StepGuard(TrainConfig(spike_factor=10.0))
    for step in range(StepGuard.WINDOW):
        guard.accept(step, 2.0, 1.0 + step / 7)
    guard.accept(99, math.nan, 1.0)
    other = StepGuard(TrainConfig(spike_factor=10.0))
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert not other.accept(100, 2.0, 1e4)
