"""`trainway quickstart`: the main job on a corpus that every machine has."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from trainway.cli.arguments import OPEN_ENDED
from trainway.cli.terminal import emit, progress_bar

if TYPE_CHECKING:
    from trainway.recipes.quickstart import QuickstartResult


def register(app: typer.Typer) -> None:
    app.command("quickstart", context_settings=OPEN_ENDED)(quickstart)


def quickstart(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the pretraining; of the tuning with tune. before them.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path("quickstart-out"),
) -> None:
    """Train a small code model on Python's own standard library, then teach it to say what a function does.

    Example: trainway quickstart --out quickstart-out
    """
    from trainway.recipes.quickstart import quickstart as run_quickstart

    with progress_bar() as progress:
        result = run_quickstart(out, tuple(words or ()), progress)
    emit(summary(result))


def summary(result: QuickstartResult) -> str:
    """What was learnt, where it is, and what to do next."""
    fall = 1 - result.val_loss / result.start_loss
    samples = "\n\n".join(indent(sample, "  | ") for sample in result.samples)
    explained = "\n\n".join(
        f"{indent(shown.function, '  | ')}\n"
        f"  before tuning:  {_line(shown.before)}\n"
        f"  after tuning:   {_line(shown.after)}\n"
        f"  its docstring:  {_line(shown.docstring)}"
        for shown in result.explained
    )
    return f"""
1. Pretraining: validation loss {result.start_loss:.3f} -> {result.val_loss:.3f} ({fall:.0%} lower).
What the model writes after these openings:

{samples}

2. Tuning on functions and their docstrings: loss on held-out ones {result.tuned_from:.3f} -> {result.tuned_to:.3f}.
What it says about functions that it has never seen:

{explained}

{result.seconds:,.0f} s of training. Where everything is:
  {result.model_dir}   the pretrained model, for AutoModelForCausalLM.from_pretrained
  {result.tuned_dir}   the tuned one
  {result.report}   the pretraining as a page: charts, samples, settings
  {result.chart}   the loss, as a picture
  {result.out / "run"}, {result.out / "tuning"}   metrics, samples, checkpoints, TensorBoard

What to do next:
  trainway generate {result.model_dir} "import os"
  trainway checkpoints {result.out / "run"} --verify
  tensorboard --logdir {result.out}
  trainway train cpu_small data.train=YOUR_TEXT.jsonl
  trainway train sft_small model.path={result.model_dir} data.train=YOUR_CHATS.jsonl"""


def _line(text: str) -> str:
    return " ".join(text.split())[:100] or "(nothing)"
