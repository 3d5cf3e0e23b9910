"""What is said of a run that does not get on: who, since when, in what, the likely cause, and the cure."""

from __future__ import annotations

from collections.abc import Mapping

from trainway.engines.heartbeat import Member, Verdict

AGAIN = "the same command goes on from the last checkpoint"

_CURES = {
    "data": "see that its data lie on a disk that answers, or raise data.prefetch_steps",
    "checkpoint": "see that the disk of run_dir answers and has room",
    "rollout": "lower data.max_response_tokens or rollout.batch_size, or raise watchdog.long_stall_s",
    "together": "run `trainway smoke` on these machines, with NCCL_DEBUG=INFO on GPUs; when it may take this long, "
    "raise watchdog.stall_s",
}
_STATES = {
    "stopped": ("its process is stopped (SIGSTOP, a debugger or a frozen container)", "see what stopped it"),
    "waiting for a disk": (
        "its process waits for a disk that does not answer",
        "see that the disks it reads and writes answer",
    ),
    "": (
        "its machine hangs, its network is cut, or a call that never returns keeps its interpreter",
        "see that its machine answers, and what its kernel's log says",
    ),
}


def describe_fault(
    found: Verdict, members: Mapping[int, Member], words: Mapping[int, str]
) -> tuple[str, str, str]:
    """(what, why, fix) for people. `words`: where the main threads of late ranks are."""
    who = name_members(found.ranks, members)
    where = f"{found.phase} of step {found.step}" if found.step else found.phase
    since, first, several = f"for {found.idle_s:.0f} s", found.ranks[0], len(found.ranks) > 1
    was = f"rank {first} was in {where}" if several else f"it was in {where}"
    place = f"it is at {words[first]}" if words.get(first) else "it does not say where it is"
    match found.fault:
        case "gone":
            what = f"{who} ended while the others went on; {was}"
            return what, "it was killed, or failed and said why itself", AGAIN
        case "silent":
            why, cure = _STATES[found.state if found.state in _STATES else ""]
            what = f"{who} {'do' if several else 'does'} not answer {since}; {was}"
            return what, why, f"{cure}; {AGAIN}"
        case "late":
            cure = _CURES.get(found.phase, "see what it does there")
            what = f"{who} {'are' if several else 'is'} in {where} {since}, and the others wait for it"
            return what, place, f"{cure}; {AGAIN}"
        case "together" if len(members) == 1:
            cure = _CURES.get(found.phase, "see what it does there")
            return f"the run does not get on: in {where} {since}", place, f"{cure}; {AGAIN}"
        case "together":
            what = f"no rank gets on: all are in {where} {since}"
            why = f"a collective operation does not end: of {members[first].name}, {place}"
            return what, why, f"{_CURES['together']}; {AGAIN}"
        case _:
            what = f"the place where the ranks meet does not answer {since}; this one is in {where}"
            why = "the launcher of the first node, or its machine, is gone or stopped"
            return what, why, f"see that it answers; {AGAIN}"


def name_members(ranks: tuple[int, ...], members: Mapping[int, Member]) -> str:
    """`rank 1 (host, pid 123)`."""
    named = [f"{r} ({members[r].host}, pid {members[r].pid})" if r in members else f"{r}" for r in ranks]
    return f"rank{'s' if len(named) > 1 else ''} {', '.join(named)}"
