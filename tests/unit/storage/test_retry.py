"""Retries: bounded, as long as the server asks, and only for what may pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trainway.errors import EnvironmentFault
from trainway.storage.retry import Backoff, Passing, persist


def failing(times: int, after_s: float = 0.0) -> Callable[[], str]:
    left = [times]

    def work() -> str:
        if left[0]:
            left[0] -= 1
            raise Passing("busy", after_s)
        return "done"

    return work


def test_it_is_tried_until_it_works() -> None:
    pauses: list[float] = []
    assert persist(failing(4), "copying", Backoff(5, 1.0, 4.0), pauses.append) == "done"
    assert len(pauses) == 4
    assert all(0 <= pause <= bound for pause, bound in zip(pauses, (1, 2, 4, 4), strict=True))


def test_attempts_are_bounded_and_named() -> None:
    pauses: list[float] = []
    with pytest.raises(EnvironmentFault, match="copying failed 3 times") as caught:
        persist(failing(99), "copying", Backoff(3, 1.0, 4.0), pauses.append)
    assert len(pauses) == 2
    assert "busy" in caught.value.why


def test_a_server_that_asks_for_time_gets_it_within_bounds() -> None:
    pauses: list[float] = []
    persist(failing(1, after_s=3.0), "copying", Backoff(3, 0.5, 10.0), pauses.append)
    persist(failing(1, after_s=9_999.0), "copying", Backoff(3, 0.5, 10.0), pauses.append)
    assert 3.0 <= pauses[0] <= 3.5
    assert 10.0 <= pauses[1] <= 10.5


def test_other_errors_pass_through_at_once() -> None:
    with pytest.raises(ValueError, match="ours"):
        persist(lambda: (_ for _ in ()).throw(ValueError("ours")), "copying", Backoff(), lambda pause: None)
