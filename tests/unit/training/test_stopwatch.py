"""A step's time is split among its phases without a remainder, and a timed learner does what the learner does."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainway.training.stopwatch import OTHER, Stopwatch, TimedLearner

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_every_moment_belongs_to_the_innermost_phase(clock: SimpleNamespace) -> None:
    watch = Stopwatch(CPU)
    clock.now += 50  # before the first step: no step's
    watch.begin_step()
    with watch.phase("data"):
        clock.now += 1
    clock.now += 2
    with watch.phase("forward"):
        clock.now += 4
        with watch.phase("rollout"):
            clock.now += 8
        clock.now += 16
    watch.begin_step()
    with watch.phase("data"):
        clock.now += 32
    watch.begin_step()
    clock.now += 64
    first, second = watch.steps()  # the third one has not ended
    assert first.phases == {OTHER: 2, "data": 1, "forward": 20, "rollout": 8}
    assert first.seconds == 31
    assert (second.seconds, second.phases["data"]) == (32, 32)


def test_a_phase_ends_when_what_runs_in_it_fails(clock: SimpleNamespace) -> None:
    watch = Stopwatch(CPU)
    watch.begin_step()
    with pytest.raises(ValueError), watch.phase("forward"):
        clock.now += 1
        raise ValueError
    clock.now += 2
    watch.begin_step()
    assert watch.steps()[0].phases == {OTHER: 2, "forward": 1}


def test_a_watch_without_a_whole_step_has_none() -> None:
    watch = Stopwatch(CPU)
    assert watch.steps() == []
    watch.begin_step()
    assert watch.steps() == []


class _Learner:
    """Takes a second forward, two backward, four for its step."""

    model, pieces, is_sharded = torch.nn.Linear(1, 1), {"weight": "a piece"}, True

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock
        self.module = torch.nn.Linear(1, 1)
        self.module.register_forward_hook(lambda *_: self._pass(1))
        self.asked: list[Any] = []

    def _pass(self, seconds: float) -> None:
        self.clock.now += seconds

    def backward(self, loss: object, *, scale: float) -> None:
        self._pass(2)
        self.asked.append((loss, scale))

    def step(self, lr_factor: float, max_norm: float, accept: object) -> float:
        self._pass(4)
        self.asked.append((lr_factor, max_norm, accept))
        return 0.5

    def reset(self) -> str:
        return "reset"


def test_a_timed_learner_does_what_the_learner_does(clock: SimpleNamespace) -> None:
    learner: Any = _Learner(clock)
    watch = Stopwatch(CPU)
    timed = TimedLearner(learner, watch)
    watch.begin_step()
    given = torch.ones(1, 1)
    assert torch.equal(timed.module(given), learner.module.weight * given + learner.module.bias)
    timed.backward("loss", scale=0.1)  # type: ignore[arg-type]
    assert timed.step(0.3, 1.0, "accept") == 0.5  # type: ignore[arg-type]
    watch.begin_step()
    assert learner.asked == [("loss", 0.1), (0.3, 1.0, "accept")]
    assert timed.reset() == "reset"
    assert (timed.pieces, timed.is_sharded, timed.model) == ({"weight": "a piece"}, True, learner.model)
    (step,) = watch.steps()
    assert {**step.phases, OTHER: 0} == {OTHER: 0, "forward": 1, "backward": 2, "optimizer": 4}
