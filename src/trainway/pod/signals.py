"""Requests to stop and ended children, as something that a loop can wait for."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """What has come since `listening` began."""

    def __init__(self) -> None:
        self.asked = False
        """Whether SIGTERM or SIGINT has come; whoever acts on it sets it back."""
        self.on_wait: Callable[[], None] = lambda: None
        """Told at each wait that whoever waits is at work."""
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM, SIGINT and the end of children, in the main thread; afterwards requests to stop are ignored."""
        # A handler alone would not end a sleep, and an Event that a handler sets can lock up with the loop's own wait.
        wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number in STOP_SIGNALS:  # nothing is left to be saved: the exit code is settled
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._reader)
            os.close(self._writer)

    def wait(self, seconds: float) -> bool:
        """Sleep until a signal or a child's end comes, at most so long; whether a stop is asked for."""
        self.on_wait()
        ready, _, _ = select.select([self._reader], [], [], max(0.0, seconds))
        if ready:
            with suppress(BlockingIOError):
                while os.read(self._reader, 512):
                    pass
        return self.asked

    def sleep(self, seconds: float) -> bool:
        """Sleep so long whatever children do; whether a stop is asked for, which ends it."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            self.wait(left)
        return self.asked

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
