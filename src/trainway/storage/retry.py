"""Work that a network may spoil, done again: bounded, with growing and random pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from trainway.errors import EnvironmentFault

T = TypeVar("T")


class Passing(Exception):
    """A failure that the next attempt may not meet: a server's 5xx or 429, a timeout, a cut connection, altered bytes.

    after_s: how long the server asks to be left alone.
    """

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: random up to a bound that doubles from `base_s` to `cap_s` (full jitter)."""

    attempts: int = 8
    base_s: float = 0.5
    cap_s: float = 30.0

    def pause(self, attempt: int, after_s: float) -> float:
        """Seconds before attempt number `attempt` (from 1), at least what the server asks for, at most twice the cap."""
        bound = min(self.cap_s, self.base_s * 2 ** (attempt - 1))
        return min(after_s, self.cap_s) + random.uniform(0, bound)


def persist(
    work: Callable[[], T], what: str, backoff: Backoff, sleep: Callable[[float], object] = time.sleep
) -> T:
    """What `work` returns, tried again while it raises Passing. Raises EnvironmentFault when all attempts are used."""
    for attempt in range(1, backoff.attempts + 1):
        try:
            return work()
        except Passing as failure:
            if attempt == backoff.attempts:
                raise EnvironmentFault(
                    f"{what} failed {attempt} times",
                    f"the last time: {failure}",
                    "see that the network and the store are well, then run the same again: it goes on from here",
                ) from failure
            sleep(backoff.pause(attempt, failure.after_s))
    raise AssertionError("at least one attempt")
