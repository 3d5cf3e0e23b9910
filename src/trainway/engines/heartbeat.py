"""Signs of life of the ranks of a run: what each tells the others, and who of them is late, silent or gone."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil
import torch.distributed as dist

from trainway.engines.pulse import Pulse

Fault = Literal["gone", "silent", "late", "together", "store"]
"""gone: the process has ended; silent: it lives, and tells nothing; late: the others wait for it; together: all hang
in one place; store: the place where ranks tell each other does not answer."""

_VERDICT = "verdict"


@dataclass(frozen=True)
class Member:
    """A process of the run, as it says itself when it comes."""

    rank: int
    host: str
    pid: int
    born: float
    """Start of the process, in seconds since the epoch: a number is given to another process later."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"


def own_member(rank: int) -> Member:
    return Member(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())


@dataclass(frozen=True)
class Beat:
    """What a rank tells again and again."""

    serial: int
    step: int
    phase: str
    count: int
    long: bool
    idle_s: float
    ended: Literal["", "done", "failed"] = ""
    neighbours: Mapping[str, str] = field(default_factory=dict)
    """Of the processes of its machine that do not run: rank → stopped, gone, or waiting for a disk."""


@dataclass(frozen=True)
class Seen:
    """What is known of a rank: its last beat, how long ago that came, and what its neighbours say of its process."""

    rank: int
    beat: Beat
    silent_s: float
    state: str = ""

    @property
    def idle_s(self) -> float:
        return self.beat.idle_s + self.silent_s


@dataclass(frozen=True)
class Verdict:
    """Who keeps the run from going on."""

    fault: Fault
    ranks: tuple[int, ...]
    step: int = 0
    phase: str = ""
    idle_s: float = 0.0
    state: str = ""


def find_fault(
    seen: Sequence[Seen], stall_s: float, long_stall_s: float, interval_s: float
) -> Verdict | None:
    """Who of the ranks keeps the others waiting; None while the run goes on.

    It goes on while the rank that is furthest behind got on within its limit, or another one in the same place did:
    it may have to wait for that one. So it does with a rank that tells nothing, as long as the others get on: they
    could not without it. Ranks that have left are none of it.

    Args:
        interval_s: between two beats of a rank.
    """
    dead = [s for s in seen if not s.beat.ended and s.state == "gone"]
    dead = dead or [s for s in seen if s.beat.ended == "failed"]
    if dead:
        return _verdict("gone", dead)
    here = [s for s in seen if not s.beat.ended]
    if not here:
        return None

    def over(s: Seen) -> bool:
        return s.idle_s > (long_stall_s if s.beat.long else stall_s)

    mute = [s for s in here if s.silent_s > max(stall_s / 2, 3 * interval_s)]
    answering = [s for s in here if s not in mute]
    if mute:
        waited = any(s.silent_s > stall_s for s in mute) or any(map(over, mute))
        return _verdict("silent", mute) if waited and all(map(over, answering)) else None
    last = min(s.beat.count for s in here)
    behind = [s for s in here if s.beat.count == last]
    if not all(map(over, behind)):
        return None
    return _verdict("late" if len(behind) < len(here) else "together", behind)


def _verdict(fault: Fault, found: Sequence[Seen]) -> Verdict:
    first = found[0]
    ranks = tuple(s.rank for s in found)
    return Verdict(fault, ranks, first.beat.step, first.beat.phase, first.idle_s, first.state)


class Roll:
    """What the ranks tell each other of themselves, through the store that they met by.

    Not for two threads at once; a call waits for as long as the store does not answer.
    """

    def __init__(
        self, store: dist.Store, own: Member, world_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # a connection of its own: another one's waiting would hold up ours
        self._store = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]
        self._own, self._world_size, self._clock = own, world_size, clock
        self._serial = 0
        self._members: dict[int, Member] = {}
        unheard = Beat(0, 0, "start", 0, True, 0.0)
        self._last: dict[int, tuple[Beat, float]] = {r: (unheard, clock()) for r in range(world_size)}
        self._store.set(f"member/{own.rank}", json.dumps(asdict(own)))

    def absent(self) -> list[int]:
        """The ranks that have not come."""
        return [rank for rank in range(self._world_size) if not self._store.check([f"member/{rank}"])]

    def members(self) -> dict[int, Member]:
        """The ranks that have come."""
        new = [rank for rank in range(self._world_size) if rank not in self._members]
        for rank in new:
            if self._store.check([key := f"member/{rank}"]):
                self._members[rank] = Member(**json.loads(self._store.get(key)))
        return self._members

    @property
    def known(self) -> Mapping[int, Member]:
        """The ranks that were seen to come; asks nobody."""
        return self._members

    def tell(self, pulse: Pulse, ended: Literal["", "done", "failed"] = "") -> None:
        """Say what this rank is in."""
        self._serial += 1
        count = pulse.count
        beat = Beat(
            self._serial, pulse.step, pulse.phase, count, pulse.long, pulse.idle_s, ended, self._neighbours()
        )
        self._store.set(f"beat/{self._own.rank}", json.dumps(asdict(beat)))

    def look(self, ranks: Collection[int]) -> list[Seen]:
        """What is known of these ranks; one that has told nothing yet is silent since this roll was begun."""
        for rank in ranks:
            if self._store.check([key := f"beat/{rank}"]):
                beat = Beat(**json.loads(self._store.get(key)))
                if self._last[rank][0].serial != beat.serial:
                    # by our own clock: those of two machines differ
                    self._last[rank] = (beat, self._clock())
        states: dict[str, str] = {}
        for beat, _ in self._last.values():
            states |= beat.neighbours
        now = self._clock()
        return [
            Seen(rank, beat, now - at, states.get(str(rank), ""))
            for rank, (beat, at) in sorted(self._last.items())
            if rank in ranks
        ]

    def accuse(self, verdict: Verdict) -> tuple[Verdict, bool]:
        """The run's verdict, and whether it is ours: the first one stays."""
        text = json.dumps({**asdict(verdict), "by": self._own.rank})
        told = json.loads(self._store.compare_set(_VERDICT, "", text))
        by = told.pop("by")
        return _read_verdict(told), by == self._own.rank

    def verdict(self) -> Verdict | None:
        """What another rank has found."""
        if not self._store.check([_VERDICT]):
            return None
        told = json.loads(self._store.get(_VERDICT))
        del told["by"]
        return _read_verdict(told)

    def leave_word(self, text: str) -> None:
        """Say where this rank's main thread is."""
        self._store.set(f"place/{self._own.rank}", text)

    def words_of(self, rank: int, wait_s: float) -> str:
        """Where the main thread of a rank is, as it says itself; empty when it does not in time."""
        end = time.monotonic() + wait_s
        while not self._store.check([key := f"place/{rank}"]):
            if time.monotonic() >= end:
                return ""
            time.sleep(0.05)
        return str(self._store.get(key).decode())

    def _neighbours(self) -> dict[str, str]:
        states = {}
        for member in self.members().values():
            # a number means a process of this machine alone
            if member.host == self._own.host and member.rank != self._own.rank:
                if self._last[member.rank][0].ended:
                    continue
                if state := process_state(member):
                    states[str(member.rank)] = state
        return states


def process_state(member: Member) -> str:
    """stopped, gone, or waiting for a disk; empty for a process of this machine that runs."""
    try:
        process = psutil.Process(member.pid)
        if abs(process.create_time() - member.born) > 1:
            return "gone"
        status = process.status()
    except psutil.NoSuchProcess:
        return "gone"
    words = {
        psutil.STATUS_STOPPED: "stopped",
        psutil.STATUS_TRACING_STOP: "stopped",
        psutil.STATUS_ZOMBIE: "gone",
        psutil.STATUS_DEAD: "gone",
        psutil.STATUS_DISK_SLEEP: "waiting for a disk",
    }
    return words.get(status, "")


def _read_verdict(told: dict[str, Any]) -> Verdict:
    return Verdict(**{**told, "ranks": tuple(told["ranks"])})
