"""`trainway serve`: a model behind OpenAI's API."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trainway.cli.arguments import PassesOn
from trainway.cli.terminal import emit, emit_json


def register(app: typer.Typer) -> None:
    app.command("serve", cls=PassesOn)(serve)


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a model directory.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; one open to others needs TRAINWAY_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    backend: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="auto: vLLM where it is installed.")
    ] = "auto",
    name: Annotated[str | None, typer.Option(help="What clients call the model; else its directory.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="What it computes in; else float32, with vLLM the type of the weights."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be started, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the dry run as JSON.")] = False,
) -> None:
    """Answer OpenAI's chat completions and completions with a model; words after -- are for vLLM.

    Example: trainway serve runs/my-run --port 8000
    """
    from trainway.release.serve import plan_serving
    from trainway.release.serve import serve as serve_model

    how: dict[str, Any] = {
        "host": host, "port": port, "backend": backend, "name": name, "dtype": dtype, "options": context.obj or []
    }  # fmt: skip
    if not dry_run and not as_json:
        serve_model(model, **how, say=emit)
        return
    plan = plan_serving(model, **how)
    if as_json:
        emit_json(asdict(plan))
        return
    lines = [f"{plan.name}: {plan.source} ({plan.how}), by {plan.backend} at {plan.url}"]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [shlex.join(plan.command)] if plan.command else []
    emit("\n".join(lines))
