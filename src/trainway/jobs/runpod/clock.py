"""Time and chance, so that a test of waits and deadlines needs neither."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_WAIT_S, MOST_WAIT_S = 1.0, 30.0
"""Of the waits between attempts, which double and of which up to half is left to chance."""


@dataclass(frozen=True)
class Clock:
    """What this machine's clock says, and how it waits."""

    now: Callable[[], float] = time.time
    """Seconds since 1970."""
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random
    """In [0, 1)."""

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after the attempt of that number, from 1 on."""
        longest = min(FIRST_WAIT_S * 2 ** (attempt - 1), MOST_WAIT_S)
        return longest * (0.5 + 0.5 * self.chance())
