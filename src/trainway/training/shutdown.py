"""Stopping on request: SIGTERM and SIGINT become a flag that the loop reads between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HINT = b"\ntrainway: already stopping; the step in hand is being finished and saved.\n"


class StopSignal:
    """Context manager that catches SIGTERM and SIGINT while it is entered.

    The first signal sets `requested`; later ones are only counted, so that an impatient scheduler or user cannot
    cut a checkpoint short. The third SIGINT raises KeyboardInterrupt: the way out of a hang. Off the main thread
    no handler can be installed; `request` still works there.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """What asked to stop: SIGTERM, SIGINT or the reason given to `request`."""
        self.time: float | None = None
        """When it asked, in seconds since the epoch."""
        self.count = 0
        """Signals received."""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def request(self, reason: str) -> None:
        """Ask to stop for a reason other than a signal; the first reason is the one that stays."""
        if self.name is None:
            self.time = time.time()
            self.name = reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._interrupts += number == signal.SIGINT
        self.request(signal.Signals(number).name)
        if self._interrupts >= 3:
            raise KeyboardInterrupt
        if self.count == 2:
            # os.write: print is not reentrant, and the signal may have interrupted a print
            with suppress(OSError):  # the terminal may be gone
                os.write(2, _HINT)
