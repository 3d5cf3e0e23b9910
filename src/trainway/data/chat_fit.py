"""Which turns a conversation that is too long does without: whole exchanges, the oldest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def exchanges(roles: Sequence[str]) -> tuple[int, list[int]]:
    """How many turns at the beginning are instructions, which stay; and where the exchanges begin that it may begin
    with instead: those of a user's turn, up to the last one with an answer."""
    kept = next(
        (index for index, role in enumerate(roles) if role not in ("system", "developer")), len(roles)
    )
    begins = [
        index
        for index in range(kept, len(roles))
        if roles[index] == "user" and (index == kept or roles[index - 1] != "user")
    ]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    last = answers[-1] if answers else -1
    return kept, [index for index in begins if kept < index <= last]


def least_left_out(starts: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first of `starts` from which on the conversation fits, by bisection; None when the last does not."""
    if not starts or not fits(starts[-1]):
        return None
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    return starts[high]
