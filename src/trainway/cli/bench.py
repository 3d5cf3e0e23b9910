"""`trainway bench`: what a configuration's steps take, and what its whole run will."""

from __future__ import annotations

from typing import Annotated

import typer

from trainway.cli.arguments import CONFIG_HELP, OPEN_ENDED, PassesOn, parse_count, split_arguments
from trainway.cli.terminal import emit, emit_json, is_main_rank, progress_bar

BENCH_METAVAR = "CONFIG [KEY=VALUE]... [-- TORCHRUN ARGS]"


def register(app: typer.Typer) -> None:
    app.command("bench", cls=PassesOn, context_settings=OPEN_ENDED)(bench)


def bench(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar=BENCH_METAVAR, help=CONFIG_HELP, show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to time, after those that warm up.")] = 100,
    nproc: Annotated[
        str | None, typer.Option(help="Processes on this machine, or auto: one per GPU.")
    ] = None,
    gpu_price: Annotated[
        float | None, typer.Option(metavar="USD", help="Of one GPU for an hour; without any, of the machine.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a Chrome trace of two more steps (.json[.gz]).")
    ] = None,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Do not keep the measurement for later plans.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure.")] = False,
) -> int:
    """Take some steps of a run, without evaluations and saves; forecast the time and the cost of all of it.

    Example: trainway bench runpod_1b data.train=corpus.jsonl --steps 20 --gpu-price 2.99
    """
    from trainway.launch.bench import start_bench

    source, settings = split_arguments(words or [])
    if nproc is not None:
        settings.append(f"engine.nproc={parse_count(nproc)}")
    options = [f"--steps={steps}", *["--no-record"] * no_record, *["--json"] * as_json]
    options += [f"--gpu-price={gpu_price}"] * (gpu_price is not None)
    options += [f"--trace={trace}"] * (trace is not None)
    with progress_bar() as progress:
        found = start_bench(
            source,
            settings,
            options=options,
            steps=steps,
            gpu_price=gpu_price,
            trace=trace,
            record=not no_record,
            torchrun_args=context.obj or [],
            progress=progress,
        )
    if isinstance(found, int):
        return found
    if is_main_rank():
        emit_json(found.to_json()) if as_json else emit(str(found))
    return 0
