"""Where the time of a step goes: marks at the borders of its phases, and a learner that sets them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainway.engines.base import Learner

OTHER = "other"
"""What no phase claims: the step's collectives, the log, the schedule."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; those of its phases add up to them."""

    seconds: float
    phases: Mapping[str, float]


class Stopwatch:
    """Splits time into steps and phases: each moment belongs to the innermost phase in hand, or to none.

    On a GPU the marks are events in its stream, so that they cost no synchronisation: time is the device's, and what
    the CPU does meanwhile costs nothing unless the device waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[str] = [OTHER]
        self._marks: list[tuple[int, str, Any]] = []  # step, the phase that begins, when
        self._step = 0

    def begin_step(self) -> None:
        """A step ends here, if one was begun, and the next one begins."""
        self._step += 1
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs within is of this phase; a phase within another one is not counted to that."""
        self._phases.append(name)
        self._mark()
        try:
            yield
        finally:
            self._phases.pop()
            self._mark()

    def steps(self) -> list[StepTime]:
        """The steps that have ended, in order. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: list[dict[str, float]] = [{} for _ in range(max(0, self._step - 1))]
        for (step, name, begin), (_, _, end) in pairwise(self._marks):
            if 1 <= step < self._step:
                phases = found[step - 1]
                phases[name] = phases.get(name, 0.0) + self._between(begin, end)
        return [StepTime(sum(phases.values()), phases) for phases in found]

    def _mark(self) -> None:
        self._marks.append((self._step, self._phases[-1], self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000


class TimedLearner:
    """A learner as it is, its forward passes, backward passes and optimiser steps timed."""

    def __init__(self, learner: Learner, watch: Stopwatch) -> None:
        self._learner, self._watch = learner, watch
        self.module: nn.Module = _TimedModule(learner.module, watch, "forward")
        self.model, self.pieces, self.is_sharded = learner.model, learner.pieces, learner.is_sharded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def micro_step(self, *, sync: bool) -> AbstractContextManager[Any]:
        return self._learner.micro_step(sync=sync)

    def backward(self, loss: Tensor, *, scale: float) -> None:
        with self._watch.phase("backward"):
            self._learner.backward(loss, scale=scale)

    def step(self, lr_factor: float, max_norm: float, accept: Callable[[float], bool]) -> float:
        with self._watch.phase("optimizer"):
            return self._learner.step(lr_factor, max_norm, accept)


class _TimedModule(nn.Module):
    def __init__(self, inner: nn.Module, watch: Stopwatch, name: str) -> None:
        super().__init__()
        self._inner, self._watch, self._name = inner, watch, name

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with self._watch.phase(self._name):
            return self._inner(*arguments, **named)
