"""The guard's judgement, at values on both sides of every bound."""

from __future__ import annotations

import pytest

from trainway.pod.guard import GO_ON, Bounds, Facts, dollars_spent, judge, limit_s

HOUR = 3600.0


def bounds(**more: float | None) -> Bounds:
    values = {"began": 1000.0, "deadline_s": 10 * HOUR, "dollars": None, "dollars_per_hour": 0.0}
    return Bounds(**{**values, "stall_s": 1800.0, "save_s": 600.0, "restarts": 2, **more})  # type: ignore[arg-type]


def kind(now: float, facts: Facts, found: Bounds) -> str:
    return judge(now, facts, found).kind


def test_a_job_within_its_bounds_goes_on() -> None:
    assert judge(1000.0 + 9 * HOUR, Facts(progressed=1000.0 + 9 * HOUR - 1799), bounds()) == GO_ON


def test_the_deadline_leaves_the_time_that_saving_takes() -> None:
    last = 1000.0 + 10 * HOUR - 600
    assert kind(last - 1, Facts(), bounds()) == "go on"
    assert kind(last, Facts(), bounds()) == "deadline"
    assert kind(last, Facts(), bounds(deadline_s=None)) == "go on"


def test_of_a_short_limit_a_twentieth_is_left() -> None:
    short = bounds(deadline_s=100.0)
    assert kind(1094.9, Facts(), short) == "go on"
    assert kind(1095.0, Facts(), short) == "deadline"


def test_the_limit_in_dollars_counts_from_the_first_start() -> None:
    paid = bounds(deadline_s=None, dollars=40.0, dollars_per_hour=8.0)  # five hours
    last = 1000.0 + 5 * HOUR - 600
    assert kind(last - 1, Facts(), paid) == "go on"
    verdict = judge(last, Facts(), paid)
    assert (verdict.kind, verdict.reason) == ("budget", "$38.67 of $40.00 are spent (limits.dollars)")
    assert dollars_spent(1000.0 + 5 * HOUR, paid) == 40.0
    assert limit_s(paid) == 5 * HOUR
    assert (
        kind(last, Facts(), bounds(deadline_s=None, dollars=40.0)) == "go on"
    )  # nothing is paid by the hour


def test_a_stall_counts_from_the_last_step_and_only_after_the_first() -> None:
    assert kind(2000.0 + 1799, Facts(progressed=2000.0), bounds()) == "go on"
    assert kind(2000.0 + 1800, Facts(progressed=2000.0), bounds()) == "stall"
    assert kind(1000.0 + 5 * HOUR, Facts(progressed=None), bounds()) == "go on"


def test_a_request_comes_before_the_limits_and_these_before_a_stall() -> None:
    late = 1000.0 + 20 * HOUR
    assert kind(late, Facts(stop_asked=True, progressed=1000.0), bounds()) == "stop"
    assert kind(late, Facts(progressed=1000.0), bounds()) == "deadline"


@pytest.mark.parametrize(
    ("code", "crashes", "expected"),
    [
        (0, 0, "done"), (75, 0, "stop"), (2, 0, "failed"), (3, 0, "failed"), (4, 0, "again"), (4, 2, "failed"), (1, 0, "again"),
        (137, 1, "again"), (137, 2, "failed"), (0, 9, "done"),
    ],
)  # fmt: skip
def test_what_an_exit_code_means(code: int, crashes: int, expected: str) -> None:
    # the clock of a job that has ended says nothing any more
    assert kind(1000.0 + 20 * HOUR, Facts(exit_code=code, crashes=crashes), bounds()) == expected
