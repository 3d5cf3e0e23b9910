"""A thread beside the work of each rank: it tells the others that the rank lives, and sees when one does not get on."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from trainway.engines.heartbeat import Beat, Member, Roll, Seen, Verdict, find_fault, own_member
from trainway.engines.pulse import Pulse
from trainway.errors import Stopped
from trainway.logs import logger

LAST_WORDS_S = 3.0
"""Time that a late rank has to say where it is, once it is accused."""
_MOST_INTERVAL_S = 2.0
_GONE_GRACE_S = 2.0
"""A process that has just ended may have said goodbye a moment before."""

_STDERR = 2
"""Where stacks go that the interpreter is not asked for: what sys.stderr is may be a progress bar."""

OnFault = Callable[[Verdict, bool, Mapping[int, Member], Mapping[int, str]], None]
"""(verdict, whether this rank speaks of it, the members, where the late ranks' main threads are): ends the process."""


class Watch:
    """Context manager that watches a run from one of its ranks, while it is entered.

    Every rank tells its pulse. Rank 0 looks at all of them, the others at rank 0, each at the processes of its machine.
    The first to find a fault speaks; all learn of it, write their stacks, and call `on_fault` in the watching thread.

    Args:
        store: where the ranks have met; None for a run of one process, which watches itself.
        stacks: file for the stacks of all threads.
        stall_s, long_stall_s: time without progress after which a rank is late, in a usual phase and in a long one.
    """

    def __init__(
        self,
        pulse: Pulse,
        rank: int,
        world_size: int,
        store: dist.Store | None,
        on_fault: OnFault,
        *,
        stall_s: float,
        long_stall_s: float,
        stacks: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self.own = own_member(rank)
        self._pulse, self._on_fault, self._stacks = pulse, on_fault, stacks
        self._stall_s, self._long_stall_s = stall_s, long_stall_s
        self._interval_s = min(_MOST_INTERVAL_S, stall_s / 20)
        self._roll = Roll(store, self.own, world_size) if store is not None else None
        self._looks_at = range(world_size) if rank == 0 else sorted({0, rank})
        self._closing = threading.Event()
        self._ending = threading.Lock()
        self._gone_since: float | None = None
        self._round_at = time.monotonic()
        self._threads = [threading.Thread(target=self._tell, name="heartbeat", daemon=True)]
        if self._roll is not None:
            self._threads.append(threading.Thread(target=self._guard, name="watch", daemon=True))

    def __enter__(self) -> Self:
        self._round_at = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, Stopped)
        if self._roll is not None and kind is not None and issubclass(kind, RuntimeError):
            self.hear()
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._interval_s + 1)
        if self._roll is not None and not self._threads[0].is_alive():
            try:
                self._roll.tell(self._pulse, "failed" if failed else "done")
            except RuntimeError:  # the store has gone with the rank that kept it
                logger.debug("no store to say goodbye to")
        if self._roll is not None:
            faulthandler.cancel_dump_traceback_later()

    def hear(self) -> None:
        """Wait until it would be known that another rank has ended; does not return when one has.

        A collective operation fails then too, and says less.
        """
        self._closing.wait(4 * self._interval_s + _GONE_GRACE_S)

    def _tell(self) -> None:
        asleep = time.monotonic()
        while not self._closing.wait(self._interval_s):
            if time.monotonic() - asleep > max(3 * self._interval_s, self._stall_s / 2):
                self._pulse.tick()  # this process was suspended: that is no standstill of its work
            try:
                found = self._round()
                self._round_at = time.monotonic()
                if found is not None:
                    self._end(*found)
            except RuntimeError as error:  # the connection is gone, which the work may not need
                logger.debug("heartbeat: %s", error)
            asleep = time.monotonic()

    def _round(self) -> tuple[Verdict, bool] | None:
        """Tell and look once; the run's verdict, and whether it is ours to speak of."""
        roll = self._roll
        if roll is None:
            pulse = self._pulse
            beat = Beat(0, pulse.step, pulse.phase, pulse.count, pulse.long, pulse.idle_s)
            alone = find_fault([Seen(0, beat, 0.0)], self._stall_s, self._long_stall_s, self._interval_s)
            return None if alone is None else (alone, True)
        roll.tell(self._pulse)
        if (told := roll.verdict()) is not None:
            return told, False
        seen = roll.look(self._looks_at)
        found = find_fault(seen, self._stall_s, self._long_stall_s, self._interval_s)
        if found is None or (self.own.rank != 0 and found.fault not in ("gone", "silent")):
            self._gone_since = None
            return None
        if found.fault == "gone":
            self._gone_since = self._gone_since or time.monotonic()
            if time.monotonic() - self._gone_since < max(_GONE_GRACE_S, self._interval_s):
                return None
        return roll.accuse(found)

    def _guard(self) -> None:
        """Ends this process when it stands still and the store cannot tell why, or when no thread gets a turn."""
        limit = self._stall_s + 3 * self._interval_s
        while not self._closing.wait(self._interval_s):
            # a C call that never returns and keeps the interpreter: nothing but this timer runs then
            faulthandler.dump_traceback_later(limit + LAST_WORDS_S, exit=True, file=_STDERR)
            waits_s = self._long_stall_s if self._pulse.long else self._stall_s
            if time.monotonic() - self._round_at > limit and self._pulse.idle_s > waits_s:
                self._end(Verdict("store", (0,), self._pulse.step, self._pulse.phase, limit), True)

    def _end(self, verdict: Verdict, ours: bool) -> None:
        if not self._ending.acquire(blocking=False) or self._closing.is_set():
            return
        words: dict[int, str] = {}
        self._write_stacks()
        if self._roll is not None and verdict.fault != "store":
            self._roll.leave_word(main_thread_place())
            if not ours:
                time.sleep(LAST_WORDS_S + 1)  # a launcher ends all ranks as soon as one is gone
            elif verdict.fault in ("late", "together"):
                words = {verdict.ranks[0]: self._roll.words_of(verdict.ranks[0], LAST_WORDS_S)}
        elif self._roll is None:
            words = {0: main_thread_place()}
        members = {self.own.rank: self.own}
        if self._roll is not None:
            members |= self._roll.known
        self._on_fault(verdict, ours, members, words)

    def _write_stacks(self) -> None:
        path = self._stacks()
        if path is None or not path.parent.is_dir():
            return
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.debug("no stacks: %s", error)


def main_thread_place() -> str:
    """Where the main thread is, in a line: the innermost call, and the innermost one of ours."""
    frame: Any = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    calls = traceback.extract_stack(frame)
    own = [call for call in calls if f"{os.sep}trainway{os.sep}" in call.filename]
    shown = [calls[-1], *([own[-1]] if own and own[-1] is not calls[-1] else [])]
    return ", called from ".join(f"{_short(call.filename)}:{call.lineno} {call.name}" for call in shown)


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
