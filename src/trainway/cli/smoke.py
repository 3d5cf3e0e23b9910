"""`trainway smoke`: is this cluster fit to train on."""

from __future__ import annotations

from typing import Annotated

import typer

from trainway.cli.arguments import PassesOn, parse_count
from trainway.smoke.report import SmokeSettings

_DEFAULT = SmokeSettings()


def register(app: typer.Typer) -> None:
    app.command("smoke", cls=PassesOn)(smoke)


def smoke(
    context: typer.Context,
    nproc: Annotated[
        str, typer.Option(help="Processes on this machine; auto: one per GPU, or 2 on the CPU.")
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Passes over the samples.")] = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of a step, over all ranks.")] = _DEFAULT.batch_size,
    samples: Annotated[int, typer.Option(help="Samples, made from the seed.")] = _DEFAULT.samples,
    features: Annotated[int, typer.Option(help="Numbers in a sample.")] = _DEFAULT.features,
    classes: Annotated[int, typer.Option(help="Classes to tell apart.")] = _DEFAULT.classes,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = _DEFAULT.lr,
    seed: Annotated[int, typer.Option(help="Seed of samples and weights.")] = _DEFAULT.seed,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a step of the test may take.")
    ] = _DEFAULT.timeout_s,
    min_bandwidth: Annotated[
        float, typer.Option(help="Least bus bandwidth of the largest all-reduce, in GB/s.")
    ] = _DEFAULT.min_bandwidth,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Test the cluster: ranks, network, data, gradients, loss, bandwidth, speed. Words after -- go to torchrun.

    Example: trainway smoke --nproc 8
    """
    from trainway.smoke.start import start_smoke

    settings = SmokeSettings(
        epochs=epochs,
        batch_size=batch_size,
        samples=samples,
        features=features,
        classes=classes,
        lr=lr,
        seed=seed,
        timeout_s=timeout,
        min_bandwidth=min_bandwidth,
    )
    return start_smoke(
        settings,
        nproc=parse_count(nproc),
        torchrun_args=context.obj or [],
        as_json=as_json,
    )
