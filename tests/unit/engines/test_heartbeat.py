"""Who keeps a run from going on, by what the ranks tell of themselves; and the threads that watch a run of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from trainway.engines.heartbeat import (
    Beat,
    Member,
    Roll,
    Seen,
    Verdict,
    find_fault,
    own_member,
    process_state,
)
from trainway.engines.pulse import Pulse
from trainway.engines.verdicts import describe_fault
from trainway.engines.watch import Watch

STALL_S, LONG_S, INTERVAL_S = 100.0, 1000.0, 2.0


def seen(
    rank: int, count: int, idle_s: float = 0.0, silent_s: float = 0.0, *, long: bool = False, state: str = "",
    ended: str = "", phase: str = "data",
) -> Seen:  # fmt: skip
    return Seen(rank, Beat(1, 57, phase, count, long, idle_s, ended), silent_s, state)  # type: ignore[arg-type]


def fault(*ranks: Seen) -> tuple[str, tuple[int, ...]] | None:
    found = find_fault(ranks, STALL_S, LONG_S, INTERVAL_S)
    return None if found is None else (found.fault, found.ranks)


def test_a_run_that_gets_on_has_no_fault() -> None:
    assert fault(seen(0, 9, 99.0), seen(1, 9, 99.0)) is None
    assert fault(seen(0, 9, 5000.0, ended="done"), seen(1, 3)) is None  # who has left is waited for by nobody
    assert fault(seen(0, 9, 900.0, long=True), seen(1, 9, 900.0, long=True)) is None


def test_the_rank_that_is_furthest_behind_is_late_not_those_that_wait_for_it() -> None:
    assert fault(seen(0, 9, 150.0), seen(1, 8, 151.0), seen(2, 9, 150.0)) == ("late", (1,))
    # they wait longer than their phase allows, and it is within what its own may take
    assert fault(seen(0, 9, 150.0), seen(1, 8, 151.0, long=True)) is None


def test_a_rank_that_gets_on_excuses_those_that_wait_in_the_same_phase() -> None:
    assert fault(seen(0, 9, 150.0), seen(1, 9, 3.0)) is None
    assert fault(seen(0, 9, 150.0), seen(1, 9, 101.0)) == ("together", (0, 1))


def test_a_rank_that_tells_nothing_is_silent() -> None:
    assert fault(seen(0, 9, 101.0), seen(1, 9, 1.0, silent_s=100.5)) == ("silent", (1,))
    # the others are in the same phase, and wait for it
    assert fault(seen(0, 9, 120.0), seen(1, 9, 40.0, silent_s=80.0)) == ("silent", (1,))
    assert fault(seen(0, 9, 50.0), seen(1, 9, 1.0, silent_s=60.0)) is None
    # only its connection is cut: the others could not get on without it
    assert fault(seen(0, 9, 50.0), seen(1, 9, 1.0, silent_s=5000.0)) is None


def test_a_process_that_is_gone_is_a_fault_at_once() -> None:
    assert fault(seen(0, 9), seen(1, 9, state="gone")) == ("gone", (1,))
    assert fault(seen(0, 9), seen(1, 9, ended="failed")) == ("gone", (1,))
    assert fault(seen(0, 9), seen(1, 9, state="gone", ended="done")) is None
    assert fault(seen(0, 9), seen(1, 9, state="stopped")) is None  # it may go on in a moment


def test_what_is_said_names_rank_host_process_phase_and_place() -> None:
    members = {rank: Member(rank, f"node-{rank}", 100 + rank, 0.0) for rank in range(2)}
    what, why, fix = describe_fault(Verdict("late", (1,), 57, "data", 481.0), members, {1: "a.py:3 read"})
    assert what == "rank 1 (node-1, pid 101) is in data of step 57 for 481 s, and the others wait for it"
    assert why == "it is at a.py:3 read"
    assert fix == (
        "see that its data lie on a disk that answers, or raise data.prefetch_steps; "
        "the same command goes on from the last checkpoint"
    )
    what, why, _ = describe_fault(Verdict("silent", (0, 1), 0, "start", 9.0, "stopped"), members, {})
    assert what == "ranks 0 (node-0, pid 100), 1 (node-1, pid 101) do not answer for 9 s; rank 0 was in start"
    assert why.startswith("its process is stopped (SIGSTOP")


def test_the_first_step_and_what_is_before_it_may_take_long() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    assert pulse.long
    pulse.enter("data", 57)
    pulse.enter("optimizer step")
    now[0] = 7.0
    assert pulse.long and pulse.idle_s == 7.0 and pulse.count == 2
    pulse.tick()
    assert pulse.idle_s == 0.0 and pulse.count == 2
    pulse.enter("data", 58)
    assert not pulse.long and (pulse.step, pulse.phase) == (58, "data")
    pulse.enter("checkpoint", long=True)
    assert pulse.long
    pulse.enter("data", 59)
    assert not pulse.long


def test_the_state_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    member = Member(1, "here", child.pid, psutil.Process(child.pid).create_time())
    assert process_state(member) == ""
    assert (
        process_state(Member(1, "here", child.pid, member.born - 60)) == "gone"
    )  # its number has another one now
    psutil.Process(child.pid).suspend()
    while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
        pass
    assert process_state(member) == "stopped"
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert process_state(member) == "gone"
    child.wait()
    assert process_state(member) == "gone"


def test_ranks_tell_each_other_through_the_store() -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    now = [0.0]
    first = Roll(store, own_member(0), 3, lambda: now[0])
    assert first.absent() == [1, 2]
    second = Roll(store, own_member(1), 3, lambda: now[0])
    assert first.absent() == [2] and set(first.members()) == {0, 1}
    pulse = Pulse()
    pulse.enter("data", 5)
    second.tell(pulse)
    now[0] = 10.0
    (found,) = first.look([1])
    assert (found.beat.step, found.beat.phase, found.silent_s) == (5, "data", 0.0)
    now[0] = 25.0
    found, unheard = first.look([1, 2])
    assert found.silent_s == 15.0 and found.idle_s >= 15.0
    assert unheard.silent_s == 25.0 and unheard.beat.phase == "start"
    second.tell(pulse)
    assert first.look([1])[0].silent_s == 0.0
    # of two accusers the first one's word stays, and both know it
    late = Verdict("late", (1,), 5, "data", 9.0)
    assert second.verdict() is None
    assert first.accuse(late) == (late, True)
    assert second.accuse(Verdict("late", (0,), 5, "data", 9.0)) == (late, False)
    assert second.verdict() == late
    second.leave_word("loader.py:3 read")
    assert first.words_of(1, 0.0) == "loader.py:3 read" and first.words_of(2, 0.0) == ""


def test_a_process_alone_watches_itself(tmp_path: Path) -> None:
    told = threading.Event()
    heard: list[object] = []

    def on_fault(found: Verdict, ours: bool, members: Mapping[int, Member], words: Mapping[int, str]) -> None:
        heard.extend([found, ours, members[0].pid, words[0]])
        told.set()

    pulse = Pulse()
    pulse.enter("data", 1)
    pulse.enter("data", 2)
    stacks = tmp_path / "stacks.txt"
    with Watch(pulse, 0, 1, None, on_fault, stall_s=0.3, long_stall_s=60.0, stacks=lambda: stacks):
        told.wait(60)
    found, ours, pid, place = heard
    assert isinstance(found, Verdict) and (found.fault, found.phase, found.step) == ("together", "data", 2)
    assert ours and pid == os.getpid()
    assert "wait" in str(place) and "test_a_process_alone_watches_itself" in stacks.read_text()


@pytest.mark.parametrize("ends", [None, ValueError("bad")])
def test_who_leaves_says_how(ends: Exception | None) -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    other = Roll(store, Member(0, "elsewhere", 1, 0.0), 2)
    try:
        with Watch(Pulse(), 1, 2, store, lambda *told: None, stall_s=60.0, long_stall_s=60.0):
            if ends is not None:
                raise ends
    except ValueError:
        pass
    (found,) = other.look([1])
    assert found.beat.ended == ("done" if ends is None else "failed")
