"""The guard: what is to become of a stage, judged from the clock and what is known of it. No side effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainway.errors import ExitCode
from trainway.jobs.orders import Orders

Kind = Literal["go on", "done", "again", "failed", "stop", "stall", "deadline", "budget"]
"""again: crashed, and worth another start."""

NEVER_AGAIN = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.ENVIRONMENT)
"""Exit codes of faults that a command meets again; training that had begun may end with the last of them for a rank that was
killed, a rank that stood still or a node that came late, and those heal."""
RESERVE = 0.05
"""Share of a limit that is kept for saving, at most: training is asked to end so long before the limit."""
HOUR_S = 3600.0


@dataclass(frozen=True)
class Bounds:
    """What a job may take. Times in seconds since 1970, durations in seconds; None is no bound."""

    began: float
    deadline_s: float | None
    dollars: float | None
    dollars_per_hour: float
    stall_s: float
    save_s: float
    restarts: int


@dataclass(frozen=True)
class Facts:
    """What is known of the stage that runs, or has just ended."""

    exit_code: int | None = None
    """None while it runs; of a process that a signal has ended 128 and its number."""
    stop_asked: bool = False
    progressed: float | None = None
    """When the training last made a step, in seconds since 1970; None before its first one, and in other stages."""
    crashes: int = 0
    """Before this one, since the training last saved a step."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why in words."""

    kind: Kind
    reason: str = ""


GO_ON = Verdict("go on")


def bounds_of(orders: Orders, began: float) -> Bounds:
    """The limits of the orders in seconds."""
    limits = orders.limits
    return Bounds(
        began=began,
        deadline_s=None if limits.hours is None else limits.hours * HOUR_S,
        dollars=limits.dollars,
        dollars_per_hour=orders.dollars_per_hour,
        stall_s=limits.stall_minutes * 60,
        save_s=limits.save_minutes * 60,
        restarts=limits.restarts,
    )


def judge(now: float, facts: Facts, bounds: Bounds) -> Verdict:
    """What is to become of the stage at `now`. A request to stop comes before the limits, and these before a stall."""
    if facts.exit_code is not None:
        return _ended(facts.exit_code, facts, bounds)
    if facts.stop_asked:
        return Verdict("stop", "stopped on request")
    if (over := over_limit(now, bounds)) is not None:
        return over
    if facts.progressed is not None and now - facts.progressed >= bounds.stall_s:
        return Verdict("stall", f"no step for {_span(now - facts.progressed)}")
    return GO_ON


def over_limit(now: float, bounds: Bounds) -> Verdict | None:
    """The limit in hours or dollars that leaves no more at `now` than saving takes."""
    spent, deadline_s, paid_s = now - bounds.began, bounds.deadline_s, _affordable_s(bounds)
    if deadline_s is not None and spent >= _usable(deadline_s, bounds):
        return Verdict("deadline", f"{_span(spent)} of {_span(deadline_s)} are over (limits.hours)")
    if paid_s is not None and spent >= _usable(paid_s, bounds):
        cost = f"${dollars_spent(now, bounds):.2f} of ${bounds.dollars:.2f}"
        return Verdict("budget", f"{cost} are spent (limits.dollars)")
    return None


def limit_s(bounds: Bounds) -> float:
    """How long the job may take in all, in seconds from its first start; infinite without a limit."""
    limits = (bounds.deadline_s, _affordable_s(bounds))
    return min((limit for limit in limits if limit is not None), default=float("inf"))


def dollars_spent(now: float, bounds: Bounds) -> float:
    """By the clock since the first start and the price of the orders."""
    return max(0.0, now - bounds.began) / HOUR_S * bounds.dollars_per_hour


def _ended(code: int, facts: Facts, bounds: Bounds) -> Verdict:
    if code == ExitCode.DONE:
        return Verdict("done")
    if code == ExitCode.STOPPED:
        return Verdict("stop", "stopped and saved by somebody on the machine")
    if code in (ExitCode.CONFIG, ExitCode.DATA):
        return Verdict("failed", f"it ended with exit code {code}, and would again")
    if facts.crashes >= bounds.restarts:
        return Verdict(
            "failed",
            f"it ended with exit code {code}, for time number {facts.crashes + 1} without a newly saved step",
        )
    return Verdict("again", f"it ended with exit code {code}")


def _affordable_s(bounds: Bounds) -> float | None:
    if bounds.dollars is None or bounds.dollars_per_hour <= 0:
        return None
    return bounds.dollars / bounds.dollars_per_hour * HOUR_S


def _usable(limit: float, bounds: Bounds) -> float:
    return limit - min(bounds.save_s, RESERVE * limit)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 2 * HOUR_S else f"{seconds / HOUR_S:.3g} h"
