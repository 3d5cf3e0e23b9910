"""Every error that a user can cause, and the exit code it ends the program with."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line: the contract that scripts and schedulers rely on."""

    DONE = 0
    INTERNAL = 1
    CONFIG = 2
    DATA = 3
    ENVIRONMENT = 4
    STOPPED = 75
    """Stopped on request with the work saved: start the same command again to go on (EX_TEMPFAIL)."""


class UserError(Exception):
    """An error that the user can cure: what happened, why, and what to do about it.

    The command line prints exactly these three lines and ends with `code`; no traceback.
    """

    code: ExitCode = ExitCode.CONFIG

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)

    @property
    def lines(self) -> str:
        """As every program of Trainway's prints it: `error: ...`, `why: ...`, `fix: ...`, those that there are."""
        told = (("error", self.what), ("why", self.why), ("fix", self.fix))
        return "\n".join(f"{label}: {text}" for label, text in told if text)


class ConfigError(UserError):
    """The configuration or the arguments are wrong (exit code 2)."""

    code = ExitCode.CONFIG


class DataError(UserError):
    """The data or a file that Trainway wrote earlier is missing, altered or malformed (exit code 3)."""

    code = ExitCode.DATA


class EnvironmentFault(UserError):
    """The machine lacks something: a device, disk space, the network, a login (exit code 4)."""

    code = ExitCode.ENVIRONMENT


class PeerFailed(Exception):
    """Another rank failed and says why; this one ends without a word."""


class Stopped(Exception):
    """Stopped on request with the work so far saved: the same command goes on from there (exit code 75).

    step: of training; saved: what is saved, in words, where that is no step.
    """

    def __init__(self, step: int = 0, *, saved: str = "") -> None:
        self.step = step
        self.saved = saved or f"step {step} is saved"
        super().__init__(f"stopped: {self.saved}")


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on to the first one; each once."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
