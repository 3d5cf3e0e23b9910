"""`trainway board`: a live page over runs, in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.terminal import emit


def register(app: typer.Typer) -> None:
    app.command("board")(board)


def board(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]", help="Directory of runs; with jobs/ beside runs/, the one above both."
        ),
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own shows it to others.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 7007,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Runs as a live page in the browser: progress, curves, samples, logs, comparison. Read-only.

    Example: trainway board /workspace --open
    """
    from trainway.board.serve import serve_board

    serve_board(
        directory,
        host=host,
        port=port,
        open_browser=open_browser,
        say=emit,
        warn=lambda text: typer.echo(text, err=True),
    )
