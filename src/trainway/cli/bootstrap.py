"""`trainway bootstrap`: a machine made ready for its first run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.arguments import OPEN_ENDED, split_arguments
from trainway.cli.terminal import emit, emit_json


def register(app: typer.Typer) -> None:
    app.command("bootstrap", context_settings=OPEN_ENDED)(bootstrap)


def bootstrap(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="The run that is meant for this machine.",
            show_default=False,
        ),
    ] = None,
    repo: Annotated[str | None, typer.Option(help="Git address of the training repository.")] = None,
    ref: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; empty: the repository's own.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the clone is; empty: by the repository's name, here.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="File or directory that must be there; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make an SSH key, clone or pull the training repository, see that the data is there; again it changes nothing.

    A machine without Trainway: sh scripts/bootstrap.sh does the same from nothing.

    Example: trainway bootstrap --repo git@github.com:me/training.git --data data/train.jsonl
    """
    from dataclasses import asdict

    from trainway.pod.bootstrap import bootstrap as make_ready

    source, settings = split_arguments(words) if words else (None, [])
    ready = make_ready(repo, ref=ref, directory=directory, data=data or (), config=source, settings=settings)
    if as_json:
        emit_json(asdict(ready))
        return
    lines = [ready.public_key, *ready.changed] if ready.changed else [ready.public_key, "nothing was changed"]
    emit("\n".join([*lines, f"next: {ready.next}"]))
