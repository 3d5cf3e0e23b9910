"""`trainway train`: train here, in one process or under torchrun."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainway.cli.arguments import (
    CONFIG_HELP,
    OPEN_ENDED,
    PassesOn,
    parse_count,
    parse_resume,
    split_arguments,
)
from trainway.cli.terminal import emit, emit_json, progress_bar
from trainway.errors import ExitCode

if TYPE_CHECKING:
    from trainway.config.schema import RunConfig

TRAIN_METAVAR = "CONFIG [KEY=VALUE]... [-- TORCHRUN ARGS]"


def register(app: typer.Typer) -> None:
    app.command("train", cls=PassesOn, context_settings=OPEN_ENDED)(train)


def train(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar=TRAIN_METAVAR, help=CONFIG_HELP, show_default=False)
    ] = None,
    nproc: Annotated[
        str | None, typer.Option(help="Processes on this machine, or auto: one per GPU.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on where a run stopped; never; or a saved STEP.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on although settings differ from those the run began with."),
    ] = False,
) -> int:
    """Train; start the same command again to go on after a stop.

    Example: trainway train m3_medium data.train=corpus.jsonl total_steps=1000
    """
    from trainway.config.load import load_config
    from trainway.launch.local import process_count, run_processes, under_launcher
    from trainway.planning.geometry import describe_plan

    source, settings = split_arguments(words or [])
    parse_resume(resume)
    if nproc is not None:
        settings.append(f"engine.nproc={parse_count(nproc)}")
    config = load_config(source, settings).config
    torchrun_args: list[str] = context.obj or []
    alone = config.engine.name == "single"
    count = (
        int(os.environ["WORLD_SIZE"])
        if under_launcher()
        else 1
        if alone
        else process_count(config.engine.nproc)
    )
    if dry_run or not torchrun_args:
        # a batch that does not divide fails here, before any process is started
        plan = describe_plan(config, count)
        if dry_run:
            emit_json(plan)
            return ExitCode.DONE
    if not under_launcher() and (count > 1 or torchrun_args):
        passed = [
            "train",
            source,
            *settings,
            "--resume",
            resume,
            *(["--allow-changes"] if allow_changes else []),
        ]
        return run_processes(count, passed, torchrun_args)
    return _train_here(config, parse_resume(resume), allow_changes)


def _train_here(config: RunConfig, resume: Literal["auto", "never"] | int, allow_changes: bool) -> int:
    from trainway.recipes.pretrain import pretrain

    with progress_bar() as progress:
        result = pretrain(config, resume=resume, allow_changes=allow_changes, progress=progress)
    if os.environ.get("RANK", "0") == "0":
        emit(f"ok: {result.run_dir}, step {result.step}")
    return ExitCode.DONE
