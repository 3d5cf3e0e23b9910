"""What a process is in at the moment: written by the work as it goes, read by whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pulse:
    """The step and phase of this process, and when it last got on.

    All ranks enter the same phases in the same order, so the one with the lowest `count` is the one the others wait
    for. Writing it costs a few assignments: nothing is sent from here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.step = 0
        """The step in hand, 0 before the first."""
        self.phase = "start"
        self.count = 0
        """Phases entered so far."""
        self.long = True
        """Whether the phase may take long: loading, the first step, rollouts, samples, saves."""
        self.moved_at = clock()
        self._starting = True

    def enter(self, phase: str, step: int | None = None, *, long: bool = False) -> None:
        """A new phase begins, at the same point of the work on every rank."""
        if step is not None:
            self._starting = self._starting and self.step in (0, step)
            self.step = step
        self.phase, self.long = phase, long or self._starting
        self.moved_at = self._clock()
        self.count += 1  # last: who reads it sees the rest already

    def tick(self) -> None:
        """The phase goes on: there was progress, on this rank alone perhaps."""
        self.moved_at = self._clock()

    @property
    def idle_s(self) -> float:
        """Seconds since there was progress."""
        return self._clock() - self.moved_at
