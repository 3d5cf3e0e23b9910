"""`trainway eval`, `generate` and `export`: what a trained model is worth, says, and leaves as."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainway.cli.terminal import emit, emit_json

Model = Annotated[Path, typer.Argument(help="A run, a checkpoint, or a model directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Part = Literal["model", "discriminator"]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command("generate")(generate)
    app.command("export")(export)


def evaluate(
    target: Model,
    data: Annotated[
        list[str] | None, typer.Option(help="Files to evaluate on; empty: the run's validation split.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts to continue, one a line.")] = None,
    as_json: AsJson = False,
) -> None:
    """Validation loss, perplexity and bits per byte; samples for prompts.

    Example: trainway eval runs/my-run --data held-out.jsonl
    """
    from trainway.cli.arguments import read_lines
    from trainway.recipes.evaluation import evaluate as evaluate_model

    result = evaluate_model(target, data=data or [], prompts=read_lines(prompts) if prompts else [])
    if as_json:
        emit_json(result)
        return
    samples = result.pop("samples", [])
    lines = [
        f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in result.items()
    ]
    emit("\n".join([*lines, *(f"\n> {sample['prompt']}\n{sample['text']}" for sample in samples)]))


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 42,
) -> None:
    """Continue a prompt.

    Example: trainway generate runs/my-run "def main(" --temperature 0.8
    """
    from trainway.release.generate import generate_text

    text = generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    emit(prompt + text)


def export(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    out: Annotated[Path, typer.Option(help="New directory for the model.")],
    which: Annotated[str, typer.Option(help="best, latest, or a step.")] = "best",
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA run's adapter into its base.")] = False,
    part: Annotated[
        Part, typer.Option(help="The model, or a gad run's discriminator: a reward model.")
    ] = "model",
) -> None:
    """Write a checkpoint's model and tokenizer as a directory that transformers loads; of a LoRA run the adapter.

    Example: trainway export runs/my-run --out my-model
    """
    from trainway.cli.arguments import parse_which
    from trainway.release.bundle import export as export_run

    emit(f"ok: {export_run(run, out, which=parse_which(which), merge=merge, part=part)}")
