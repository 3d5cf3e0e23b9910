"""The copy of a run that goes on beside its training; whatever becomes of it, the training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainway.pod.processes import Child

PAUSE_S = 600.0
"""Until a copy that has ended by itself is started again."""
LEAVE_S = 10.0


class Following:
    """Keeps one copying process going."""

    def __init__(self, start: Callable[[], Child], say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._child: Child | None = None
        self._again = 0.0

    def look(self) -> None:
        """Start it, or start it again some time after it has ended."""
        if self._child is None:
            if time.monotonic() >= self._again:
                self._begin()
            return
        code = self._child.exit_code()
        if code is not None:
            self._child.kill()
            self._child, self._again = None, time.monotonic() + PAUSE_S
            self._say(
                f"the copy has ended with exit code {code}: the training goes on, and the copy in {PAUSE_S / 60:g} minutes"
            )

    def _begin(self) -> None:
        try:
            self._child = self._start()
        except OSError as error:
            self._again = time.monotonic() + PAUSE_S
            self._say(f"the copy cannot be started: {error}; the training goes on")

    def end(self) -> None:
        """End it; what it was at, the final copy completes."""
        if self._child is None:
            return
        self._child.ask_to_end()
        end = time.monotonic() + LEAVE_S
        while self._child.exit_code() is None and time.monotonic() < end:
            time.sleep(0.05)
        self._child.kill()
