"""How every recipe begins: model and data found, processes met, the run's directory opened under its lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from trainway.checkpoint.lock import run_lock
from trainway.config.schema import RunConfig
from trainway.data.prepare import prepare
from trainway.data.turns import Progress
from trainway.engines.world import open_world
from trainway.files import disk_faults
from trainway.logs import start_logging
from trainway.recipes.model import find_run_base, run_shape
from trainway.recipes.starting import record_start
from trainway.report.page import write_at_end
from trainway.run_dir import RunDir
from trainway.training.memory import memory_advice
from trainway.training.runs import Resume, choose_run_dir, run_status
from trainway.training.session import RunResult, Session, begin_session, finished_before
from trainway.training.shutdown import StopSignal
from trainway.training.watchdog import watched

Result = TypeVar("Result")


def run_recipe(
    config: RunConfig,
    train: Callable[[Session, StopSignal], Result],
    *,
    resume: Resume = "auto",
    allow_changes: bool = False,
    progress: Progress | None = None,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> Result | RunResult:
    """Open a run, or one that was stopped or killed again, and `train` in it.

    Args:
        resume: `auto` goes on from the newest intact checkpoint, `never` begins a new run, a number resumes there.
        allow_changes: go on although settings or data differ from those the run began with.
        progress: told (label, bytes done, bytes in all) while model and data are prepared.
        origins: of the settings, as `LoadedConfig.origins`, where they are known: for the run's report.

    Raises:
        UserError: the message says what to do; nothing that was saved before is lost.
        Stopped: SIGTERM or SIGINT came; the last finished step is saved.
    """
    with ExitStack() as stack:
        base = find_run_base(config, progress)
        began = time.perf_counter()
        # before the process group exists: it may take longer than a collective may wait
        prepared = prepare(config, progress=progress, tokenizer_dir=base.directory if base else None)
        preparing_s = 0.0 if prepared.cached else time.perf_counter() - began
        world = stack.enter_context(open_world(config.engine, config.train.num_threads))
        start_logging(config.log.level, is_main=world.is_main)
        run = RunDir(Path(world.from_main(str(choose_run_dir(config, resume).path) if world.is_main else "")))
        world.together(lambda: stack.enter_context(run_lock(run)) if world.is_main else None)
        stack.enter_context(disk_faults(run.path))
        stack.enter_context(watched(config.watchdog, world, run))
        if run_status(run)["state"] == "done" and resume == "auto":
            return finished_before(config, run, allow_changes)
        session = begin_session(config, world, run, prepared, base, resume, allow_changes, preparing_s)
        world.together(lambda: record_start(session, origins) if world.is_main else None)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(memory_advice(config, run_shape(session), session.geometry, world))
        result = train(session, stop)
        if isinstance(result, RunResult):
            world.together(lambda: write_at_end(run) if world.is_main else None)
        return result
