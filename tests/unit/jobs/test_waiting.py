"""How long `up` waits for a machine: the limit, what is said meanwhile, the error."""

from __future__ import annotations

from trainway.errors import ExitCode
from trainway.jobs.spec import Limits
from trainway.jobs.waiting import Deadline


class Time:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_it_is_over_after_its_minutes_and_begins_anew_for_what_has_come() -> None:
    time = Time()
    deadline = Deadline(2, lambda line: None, now=time)
    time.seconds += 119
    assert not deadline.is_over() and deadline.waited_s == 119
    time.seconds += 1
    assert deadline.is_over()
    deadline.renew()
    assert not deadline.is_over() and deadline.waited_s == 0


def test_it_is_told_once_a_minute() -> None:
    time, said = Time(), []
    deadline = Deadline(30, said.append, now=time)
    for _ in range(25):
        deadline.tell("pod abc: STARTING")
        time.seconds += 5
    assert said == [
        "waiting for pod abc: STARTING, 1 of 30 minutes (limits.start_minutes)",
        "waiting for pod abc: STARTING, 2 of 30 minutes (limits.start_minutes)",
    ]


def test_the_error_names_the_limit() -> None:
    fault = Deadline(Limits().start_minutes, print).fault(
        "pod abc", "it is PROVISIONING", "it is ended; try later"
    )
    assert fault.code == ExitCode.ENVIRONMENT
    assert str(fault) == (
        "pod abc has not come within 30 minutes (limits.start_minutes)\nit is PROVISIONING\nit is ended; try later"
    )
