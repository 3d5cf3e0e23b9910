"""`trainway sync`: a run's copy in object storage, made while it trains, and brought back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.terminal import emit, progress_bar


def register(app: typer.Typer) -> None:
    app.command("sync")(sync)


def sync(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    url: Annotated[str, typer.Argument(help="s3://bucket/path, gs://bucket/path, or a directory.")],
    every: Annotated[
        float | None, typer.Option(help="Follow the run: seconds between two passes, until stopped.")
    ] = None,
    bring_back: Annotated[
        bool, typer.Option("--restore", help="Make the run directory what its copy is, to go on from it.")
    ] = False,
) -> int | None:
    """Copy a run to object storage once, follow it while it trains, or bring it back. Every byte is verified.

    Example: trainway sync runs/my-run s3://my-bucket/my-run --every 60
    """
    from trainway.errors import ConfigError

    if bring_back and every is not None:
        raise ConfigError("--restore brings a run back once", "--every follows one", "leave one of them out")
    if bring_back:
        from trainway.storage.restore import restore

        with progress_bar() as progress:
            found = restore(url, run, progress=progress)
        for skipped, problem in found.skipped:
            emit(f"step {skipped} is passed over: {problem}")
        emit(f"{run} is at step {found.step}" if found.step is not None else f"{run} has no checkpoint yet")
        return None
    if every is not None:
        from trainway.storage.follow import follow

        return follow(run, url, every)
    from trainway.storage.sync import copy_run

    step = copy_run(run, url)
    emit(
        f"{url} holds {run}" + (f", at step {step}" if step is not None else ", which has no checkpoint yet")
    )
    return None
