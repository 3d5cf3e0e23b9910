"""Which ranks an agent ends by force: those that stay stopped once another one has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil

from trainway.launch.stopped import LOOKS, StoppedRanks


@dataclass
class Process:
    pid: int
    state: str = psutil.STATUS_RUNNING
    used: float = 1.0

    def status(self) -> str:
        return self.state

    def cpu_times(self) -> tuple[float, float]:
        return self.used, 0.0


def ranks(*processes: Process) -> StoppedRanks:
    found: Any = lambda: processes  # noqa: E731
    return StoppedRanks(found)


def test_nobody_is_ended_while_all_ranks_live() -> None:
    one, two = Process(1), Process(2, psutil.STATUS_STOPPED)
    look = ranks(one, two).look
    assert [look() for _ in range(3 * LOOKS)] == [[]] * 3 * LOOKS


def test_a_rank_that_stays_stopped_is_ended_once_another_has_gone() -> None:
    one, two, three = Process(1), Process(2, psutil.STATUS_STOPPED), Process(3)
    look = ranks(one, two, three).look
    assert look() == []
    one.state = psutil.STATUS_ZOMBIE
    assert [look() for _ in range(LOOKS)] == [*[[]] * (LOOKS - 2), [two], [two]]


def test_a_rank_that_is_stopped_now_and_then_goes_on() -> None:
    one, two = Process(1), Process(2, psutil.STATUS_STOPPED)
    look = ranks(one, two).look
    look()
    one.state = psutil.STATUS_ZOMBIE
    for _ in range(3 * LOOKS):  # seen stopped each time, it has worked in between
        two.used += 0.01
        assert look() == []
    two.used += 0.01
    for turn in range(3 * LOOKS):
        two.state = psutil.STATUS_RUNNING if turn % LOOKS == LOOKS - 2 else psutil.STATUS_STOPPED
        assert look() == []
