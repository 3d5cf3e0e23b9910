"""What the doctor says: one finding per matter, and the subject that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Literal

from trainway.config.schema import RunConfig
from trainway.errors import UserError
from trainway.masking import hide_secrets, secret_values

Level = Literal["ok", "warning", "failure"]

POD_VARIABLE = "RUNPOD_POD_ID"
PAID_VARIABLE = "TRAINWAY_PAID"


@dataclass(frozen=True)
class Finding:
    """One matter that was looked at: how it is, why that counts, and the command that cures it."""

    level: Level
    name: str
    what: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """A run that is meant for this machine; without a configuration, the machine alone."""

    environ: Mapping[str, str]
    config: RunConfig | None = None
    ranks: int = 1
    """Processes on this machine."""
    paid: bool = False
    """The machine is rented by the hour, and what lies on its own disk goes with it."""

    @property
    def offline(self) -> bool:
        return is_offline(self.environ)


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the Hub, as its own library reads it."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_paid(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this is a rented pod; TRAINWAY_PAID=0 says that it does not count as one."""
    told = environ.get(PAID_VARIABLE, "")
    return told != "0" if told else bool(environ.get(POD_VARIABLE))


def ok(name: str, what: str) -> Finding:
    return Finding("ok", name, what)


def warning(name: str, what: str, why: str, fix: str) -> Finding:
    """Something to know: the run would start, and may be slower or lose something."""
    return Finding("warning", name, what, why, fix)


def failure(name: str, what: str, why: str, fix: str) -> Finding:
    """Something to cure first: the run would end by it."""
    return Finding("failure", name, what, why, fix)


def fault(name: str, error: UserError) -> Finding:
    """The failure that training would end with."""
    return Finding("failure", name, error.what, error.why or "the run would end with this error", error.fix)


def bounded(name: str, check: Callable[[], Iterable[Finding]], limit_s: float) -> list[Finding]:
    """What a check finds; a failure when it takes longer than `limit_s`, or breaks.

    It runs in a thread that is left behind at the limit: a dead network disk holds a process for ever, and no
    timeout of Python's reaches into that.
    """
    found: list[Finding] = []
    broken: list[Exception] = []

    def run() -> None:
        try:
            found.extend(check())
        except UserError as error:
            found.append(fault(name, error))
        except Exception as error:  # one check that breaks must not keep the others from speaking
            broken.append(error)

    thread = Thread(target=run, name=f"doctor: {name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return [_overdue(name, limit_s)]
    return [*found, *(_broken(name, error) for error in broken)]


def without_secrets(findings: Iterable[Finding], environ: Mapping[str, str]) -> list[Finding]:
    """The findings with everything that is or looks like a secret replaced by ***."""
    values = secret_values(environ)

    def clean(text: str) -> str:
        return hide_secrets(text, values)

    return [
        replace(item, what=clean(item.what), why=clean(item.why), fix=clean(item.fix)) for item in findings
    ]


def failures(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "failure"]


def listed(items: Sequence[object], most: int = 4) -> str:
    """The first `most` items, and how many more there are."""
    shown = ", ".join(map(str, items[:most]))
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def gib(size: float) -> str:
    """Bytes as GiB, to be read by people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _overdue(name: str, limit_s: float) -> Finding:
    return failure(
        "unanswered",
        f"{name}: no answer within {limit_s:g} s",
        "a disk, a network or a device that it asks does not answer, and would hold the run up the same way",
        "see whether `ls` on each directory and `nvidia-smi` answer at all; mount or connect anew what does not",
    )


def _broken(name: str, error: Exception) -> Finding:
    return warning(
        "broken-check",
        f"{name}: could not be looked at",
        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        "look at this matter by hand; the other checks are not affected",
    )
