"""`trainway train` whose reading of data waits for ever at a step, on rank 1 or the only one: as a dead disk would have it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from trainway.cli.app import main
from trainway.data.loader import Loader

STUCK_AT = 12


def read_from_a_dead_disk(fifo: str) -> None:
    with open(fifo):  # nobody ever writes to it
        pass


def stick(fifo: str) -> None:
    read = Loader.steps

    def steps(self: Loader, *bounds: int) -> Iterator[Any]:
        for batch in read(self, *bounds):
            if batch.step == STUCK_AT:
                read_from_a_dead_disk(fifo)
            yield batch

    Loader.steps = steps  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if os.environ.get("RANK", "1") == "1":
        stick(sys.argv[1])
    sys.exit(main(["train", *sys.argv[2:]]))
