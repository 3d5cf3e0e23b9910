"""`trainway train`: train here, in one process or under torchrun."""

from __future__ import annotations

from typing import Annotated

import typer

from trainway.cli.arguments import (
    CONFIG_HELP,
    OPEN_ENDED,
    PassesOn,
    parse_count,
    parse_resume,
    split_arguments,
)
from trainway.cli.terminal import emit_json, progress_bar
from trainway.errors import ExitCode

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan as JSON and stop.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on although settings differ from those the run began with."),
    ] = False,
) -> int:
    """Train; start the same command again to go on after a stop.

    Example: trainway train m3_medium data.train=corpus.jsonl total_steps=1000
    """
    from trainway.doctor.checks import refuse_unready
    from trainway.launch.local import start_training

    source, settings = split_arguments(words or [])
    if nproc is not None:
        settings.append(f"engine.nproc={parse_count(nproc)}")
    if dry_run:
        _show_plan(source, settings)
        return ExitCode.DONE
    refuse_unready(source, settings)
    with progress_bar() as progress:
        return start_training(
            source,
            settings,
            resume=parse_resume(resume),
            allow_changes=allow_changes,
            torchrun_args=context.obj or [],
            progress=progress,
        )


def _show_plan(source: str, settings: list[str]) -> None:
    from trainway.config.load import load_config
    from trainway.launch.devices import process_count
    from trainway.planning.geometry import describe_plan

    config = load_config(source, settings).config
    emit_json(describe_plan(config, process_count(config.engine)))
