"""The last resort against a supervisor that hangs: it acts once nothing else will, and never beside one that works."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.pod_material import orders_for
from trainway.pod.deadman import Deadman
from trainway.pod.ending import Answer
from trainway.pod.leaving import last_resort


class Watched:
    """A deadman by a clock that the test sets, and what it has done."""

    def __init__(self, answers: list[Answer]) -> None:
        self.seconds, self.asked, self.said, self.looked = 0.0, 0, [], threading.Semaphore(0)
        self._answers = answers
        self.deadman = Deadman(
            3600.0, self._now, self._act, say=self.said.append, still_s=600.0, look_s=0.001
        )
        self.deadman.start()

    def _now(self) -> float:
        self.looked.release()
        return self.seconds

    def _act(self) -> Answer:
        self.asked += 1
        return self._answers.pop(0)

    def look_at(self, seconds: float) -> None:
        """Set the clock, and wait for two looks: one may have begun before."""
        self.seconds = seconds
        while self.looked.acquire(blocking=False):
            pass
        for _ in range(2):
            if self.deadman._thread.is_alive():
                self.looked.acquire(timeout=60)

    def over(self) -> None:
        self.deadman.end()
        self.deadman._thread.join(60)
        assert not self.deadman._thread.is_alive()


def test_it_acts_past_every_limit_when_nothing_was_heard_for_long_and_asks_until_it_is_agreed() -> None:
    watched = Watched([Answer(False, "busy"), Answer(True, "agreed")])
    watched.look_at(3599.0)
    assert watched.asked == 0
    watched.seconds = 3600.0
    watched.deadman._thread.join(60)
    assert watched.asked == 2
    assert watched.said[0].startswith("the supervisor has not been heard of for 60 minutes, past every limit")
    assert watched.said[-1] == "agreed"


def test_it_leaves_a_supervisor_alone_that_works_on_past_the_limit() -> None:
    watched = Watched([])
    for minute in range(60, 90):
        watched.seconds = minute * 60.0
        watched.deadman.beat()
        watched.look_at(minute * 60.0 + 59)
    watched.over()
    assert watched.asked == 0


def test_it_is_over_with_the_job() -> None:
    watched = Watched([])
    watched.over()
    watched.seconds = 1e9
    assert watched.asked == 0


@pytest.mark.parametrize(
    ("more", "is_there"),
    [
        ({"ender": "runpod"}, True),
        ({"ender": "command", "end_command": ["true"]}, True),
        ({"ender": "command"}, False),
        ({"ender": "exit"}, False),
        ({"ender": "runpod", "machine": "keep"}, False),
    ],
)
def test_only_what_costs_has_one(tmp_path: object, more: dict[str, object], is_there: bool) -> None:
    act: Callable[[], Answer] | None = last_resort(orders_for(tmp_path, **more), {})  # type: ignore[arg-type]
    assert (act is not None) is is_there
