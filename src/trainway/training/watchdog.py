"""A run that stands still is ended, with the rank that it waits for, what that rank was in, and the cure."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from trainway.config.schema import WatchdogConfig
from trainway.engines.heartbeat import Member, Verdict
from trainway.engines.verdicts import describe_fault
from trainway.engines.watch import Watch
from trainway.engines.world import World
from trainway.errors import ExitCode
from trainway.logs import log_to_file, logger
from trainway.run_dir import RunDir
from trainway.training.runs import write_status

LEAVE_S = 30.0
"""Time that a rank has to end by itself once another one has: a failed collective operation may do it."""


@contextmanager
def watched(config: WatchdogConfig, world: World, run: RunDir) -> Iterator[None]:
    """Watch the run from this rank while the block runs.

    When it stands still, one rank says so, every rank writes its threads' stacks to `run.stacks`, and all end with
    exit code 4: nothing else can end a thread that waits within a library. When a rank has died, the others end too.
    """
    if not config.enabled:
        yield
        return

    def end(found: Verdict, ours: bool, members: Mapping[int, Member], words: Mapping[int, str]) -> None:
        what, why, fix = describe_fault(found, members, words)
        if found.fault == "gone":
            if ours:
                logger.error("%s: %s", what, why)
            time.sleep(LEAVE_S)
            os._exit(ExitCode.INTERNAL)  # the launcher knows how the other one ended
        if ours:
            _say(
                run,
                world,
                what,
                why,
                f"{fix}; the stacks are in {run.stacks(found.ranks[0]).with_name('stacks-rank-*')}",
            )
            write_status(run, "failed", max(0, found.step - 1), error=what)
        logging.shutdown()
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(ExitCode.ENVIRONMENT)

    watch = Watch(
        world.pulse,
        world.rank,
        world.world_size,
        world.store if world.world_size > 1 else None,
        end,
        stall_s=config.stall_s,
        long_stall_s=config.long_stall_s,
        stacks=lambda: run.stacks(world.rank),
    )
    with watch:
        yield


def _say(run: RunDir, world: World, what: str, why: str, fix: str) -> None:
    if not world.is_main and run.log.exists():
        log_to_file(run.log)  # in the place of rank 0, which may be the one that hangs
    for label, text in (("error", what), ("why", why), ("fix", fix)):
        logger.error("%s: %s", label, text)
