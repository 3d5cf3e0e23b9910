"""The last resort: a supervisor that hangs itself, as on a volume that does not answer, does not go on costing for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from trainway.pod.ending import Answer, keep_asking

LOOK_S = 5.0
STILL_S = 600.0
"""Longer than anything that the supervisor waits for without a look at its clock."""


class Deadman:
    """A thread that ends the machine when the time of the job is over and the supervisor has not been heard of for long.

    It touches no file: a disk that hangs whoever reads or writes there is what it is for. It acts beside a supervisor
    that hangs, never beside one that works.

    end_at: after every limit, in the seconds of `now`; still_s: for how long the supervisor must have been silent;
    act: asks once for the end of the machine.
    """

    def __init__(
        self,
        end_at: float,
        now: Callable[[], float],
        act: Callable[[], Answer],
        *,
        say: Callable[[str], None] | None = None,
        still_s: float = STILL_S,
        look_s: float = LOOK_S,
    ) -> None:
        self._end_at, self._now, self._act, self._say = end_at, now, act, say or _tell
        self._still_s, self._look_s = still_s, look_s
        self._heard = now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deadman", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def beat(self) -> None:
        """The supervisor is at work."""
        self._heard = self._now()

    def end(self) -> None:
        """There is nothing more to watch over: the machine has agreed to end, or is to be kept."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._look_s):
            now = self._now()
            if now >= self._end_at and now - self._heard >= self._still_s:
                self._say(
                    f"the supervisor has not been heard of for {(now - self._heard) / 60:.0f} minutes, past every limit: "
                    "the machine is stopped without it"
                )
                keep_asking(self._act, self._say, self._over.wait, self._look_s)
                return


def _tell(text: str) -> None:
    """A line on standard error, by a thread of its own: whoever reads there may hang too."""
    line = f"[JOB] {text}\n".encode("utf-8", "backslashreplace")

    def write() -> None:
        with suppress(OSError):
            os.write(2, line)

    threading.Thread(target=write, daemon=True).start()
