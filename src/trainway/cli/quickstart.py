"""`trainway quickstart`: the main job on a corpus that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.arguments import OPEN_ENDED
from trainway.cli.terminal import emit, progress_bar


def register(app: typer.Typer) -> None:
    app.command("quickstart", context_settings=OPEN_ENDED)(quickstart)


def quickstart(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path("quickstart-out"),
) -> None:
    """Train a small code model on Python's own standard library: data, tokenizer, training, samples, chart.

    Example: trainway quickstart --out quickstart-out
    """
    from trainway.recipes.quickstart import quickstart as run_quickstart

    with progress_bar() as progress:
        result = run_quickstart(out, tuple(words or ()), progress)
    emit(f"loss {result.start_loss:.3f} -> {result.val_loss:.3f} in {result.seconds:,.0f} s")
    for sample in result.samples:
        emit(f"\n{sample}")
    emit(f"\nmodel: {result.model_dir}\nchart: {result.chart}")
