"""How long `up` waits for a machine that does not come: one limit for every target, told while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainway.errors import EnvironmentFault
from trainway.jobs.target import Say

SAY_EVERY_S = 60.0


class Deadline:
    """The time of `limits.start_minutes` from now on, for one machine, or for the pods of one step, to come.

    Whoever waits asks `is_over` at each look, and calls `tell` then too. What has come is given time anew by `renew`: an
    upload, or a preparation that runs, is no waiting. When it is over, `fault` is what is raised, after what this `up`
    has rented is ended; what was there before is left.

    minutes: of `job.orders.limits.start_minutes`; now: seconds by any clock that only goes on.
    """

    def __init__(self, minutes: float, say: Say, *, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._say, self._now = minutes * 60, say, now
        self._began = self._said = now()

    @property
    def waited_s(self) -> float:
        """Since the beginning, or since it was renewed."""
        return self._now() - self._began

    def is_over(self) -> bool:
        """Whether what is waited for is given up."""
        return self.waited_s >= self._limit_s

    def renew(self) -> None:
        """It has come, or gets on: the time begins anew."""
        self._began = self._said = self._now()

    def tell(self, what: str) -> None:
        """Say once a minute what is waited for and how long yet, e.g. `pod abc: STARTING`."""
        if self._now() - self._said >= SAY_EVERY_S:
            self._said = self._now()
            self._say(f"waiting for {what}, {self.waited_s / 60:.0f} of {self}")

    def __str__(self) -> str:
        """`30 minutes (limits.start_minutes)`."""
        return f"{self._limit_s / 60:g} minutes (limits.start_minutes)"

    def fault(self, what: str, why: str, fix: str) -> EnvironmentFault:
        """`what` has not come in time; `why`: the provider's last word on it; `fix`: what is left, and what to do now."""
        return EnvironmentFault(f"{what} has not come within {self}", why, fix)
