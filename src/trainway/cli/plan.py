"""`trainway plan`: memory, steps, hours, dollars, before anything is rented."""

from __future__ import annotations

from typing import Annotated

import typer

from trainway.cli.arguments import CONFIG_HELP, CONFIG_METAVAR, OPEN_ENDED, split_arguments
from trainway.cli.terminal import emit, emit_json, is_terminal
from trainway.errors import ExitCode


def register(app: typer.Typer) -> None:
    app.command("plan", context_settings=OPEN_ENDED)(plan)


def plan(
    words: Annotated[
        list[str] | None, typer.Argument(metavar=CONFIG_METAVAR, help=CONFIG_HELP, show_default=False)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Type of GPU, such as H100 or A100-80, or cpu; empty: the cheapest that fits."),
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option("--num-gpus", "--num_gpus", help="GPUs of each node; empty: engine.nproc, else 1."),
    ] = None,
    num_nodes: Annotated[int, typer.Option("--num-nodes", "--num_nodes", help="Nodes.")] = 1,
    rows: Annotated[
        int | None, typer.Option(help="Rows of the training split, where they are not known.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars of one GPU for an hour, instead of the list price.")
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh-prices", "--refresh_prices", help="Ask RunPod for its prices; needs RUNPOD_API_KEY."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """What a run takes on given GPUs, and where it fits; exit code 4 when it does not fit.

    Example: trainway plan runpod_2b --gpu H100 --num-gpus 8
    """
    from trainway.config.load import load_config
    from trainway.planning.plan import plan as make
    from trainway.planning.plan_text import describe
    from trainway.planning.prices import refresh_prices

    source, settings = split_arguments(words or [])
    loaded = load_config(source, settings)
    found = make(
        loaded.config,
        gpu,
        num_gpus,
        num_nodes,
        rows=rows,
        price=price,
        prices=refresh_prices() if refresh else None,
    )
    if as_json:
        emit_json(found.to_json())
    else:
        emit(describe(found, loaded.source_name, bars=is_terminal()))
    return ExitCode.DONE if found.fits else ExitCode.ENVIRONMENT
