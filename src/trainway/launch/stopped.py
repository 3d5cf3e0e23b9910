"""Ranks that are stopped while their run has ended: a request to end never reaches them, and SIGKILL does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

EVERY_S = 1.0
LOOKS = 5
"""A rank that was stopped at so many looks in a row, and used no processor time between them, does not go on."""


def kill_stopped_ranks() -> None:
    """In a thread of the agent: once one of its ranks has ended, end those that are stopped (SIGSTOP).

    A stopped process keeps SIGTERM for later, and could save nothing: torchrun would wait for it in vain.
    """
    ranks = StoppedRanks(psutil.Process().children)

    def watch() -> None:
        while True:
            time.sleep(EVERY_S)
            for process in ranks.look():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    threading.Thread(target=watch, name="stopped ranks", daemon=True).start()


class StoppedRanks:
    """Looks at the ranks of an agent again and again."""

    def __init__(self, children: Callable[[], Sequence[psutil.Process]]) -> None:
        self._children = children
        self._most = 0
        self._stopped: dict[int, tuple[float, int]] = {}
        """By process: its processor time when it was first seen stopped, and the looks since."""

    def look(self) -> list[psutil.Process]:
        """The processes that would keep the others' end from being the run's."""
        alive = []
        for child in self._children():
            with suppress(psutil.NoSuchProcess):
                if (status := child.status()) != psutil.STATUS_ZOMBIE:
                    alive.append(child)
                    self._note(child, status)
        self._most = max(self._most, len(alive))
        if len(alive) == self._most:
            return []
        return [child for child in alive if self._stopped.get(child.pid, (0.0, 0))[1] >= LOOKS]

    def _note(self, child: psutil.Process, status: str) -> None:
        used = sum(child.cpu_times()[:2])
        before, looks = self._stopped.get(child.pid, (used, 0))
        if status != psutil.STATUS_STOPPED:
            self._stopped.pop(child.pid, None)
        else:
            self._stopped[child.pid] = (used, looks + 1 if used == before else 1)
