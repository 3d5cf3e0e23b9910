"""Ranks that are stopped while their run has ended: a request to end never reaches them, and SIGKILL does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

EVERY_S = 1.0


def kill_stopped_ranks(every_s: float = EVERY_S) -> None:
    """In a thread of the agent: once one of its ranks has ended, end those that are stopped (SIGSTOP).

    A stopped process keeps SIGTERM for later, and could save nothing: torchrun would wait for it in vain.
    """
    own = psutil.Process()
    look = _Look(lambda: own.children())

    def watch() -> None:
        while True:
            time.sleep(every_s)
            for process in look.to_kill():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    threading.Thread(target=watch, name="stopped ranks", daemon=True).start()


class _Look:
    """What the ranks of an agent are, from one look to the next."""

    def __init__(self, children: Callable[[], list[psutil.Process]]) -> None:
        self._children = children
        self._most = 0

    def to_kill(self) -> list[psutil.Process]:
        states = {}
        for child in self._children():
            with suppress(psutil.NoSuchProcess):
                states[child] = child.status()
        alive = [child for child, state in states.items() if state != psutil.STATUS_ZOMBIE]
        self._most = max(self._most, len(alive))
        if len(alive) == self._most:
            return []
        return [child for child in alive if states[child] == psutil.STATUS_STOPPED]
