"""Benchmarks on this machine: in this process, or under torchrun when there are several devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.launch.local import PARENT, PrepareProgress, settle_environment, spread

if TYPE_CHECKING:  # the runtime import of torch waits until something really runs in this process
    from trainway.recipes.bench_result import BenchResult


def start_bench(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    options: Sequence[str] = (),
    steps: int = 100,
    gpu_price: float | None = None,
    trace: str | None = None,
    record: bool = True,
    torchrun_args: Sequence[str] = (),
    progress: PrepareProgress | None = None,
) -> BenchResult | int:
    """Measure what CONFIG says: the result, or the exit code of the processes that it was measured in.

    Args:
        options: what the others are on the command line, for those processes.

    Raises:
        UserError, Stopped: as `bench`, when it runs in this process.
        EnvironmentFault: a library is missing, or a rank was killed, most likely because memory ran out.
    """
    config = load_config(source, overrides).config
    code = spread(config, ["bench", str(source), *overrides, *options], torchrun_args)
    if code is not None:
        return code
    return bench_here(
        config,
        steps=steps,
        gpu_price=gpu_price,
        trace=trace,
        record=record,
        progress=progress,
        began=_began(),
    )


def bench_here(
    config: RunConfig,
    *,
    steps: int = 100,
    gpu_price: float | None = None,
    trace: str | Path | None = None,
    record: bool = True,
    progress: PrepareProgress | None = None,
    began: float | None = None,
) -> BenchResult:
    """Measure in this process, which is the whole benchmark or one rank of it; see `recipes.bench.bench`."""
    settle_environment(config)
    from trainway.recipes.bench import bench

    return bench(
        config,
        steps=steps,
        gpu_price=gpu_price,
        trace=trace,
        record=record,
        progress=progress,
        began=began,
    )


def _began() -> float:
    """When this command was given: the start of this process, or of the one that has started the ranks."""
    parent = os.environ.get(PARENT)
    try:
        return float(psutil.Process(int(parent) if parent else None).create_time())
    except psutil.NoSuchProcess:  # our parent is in another container
        return float(psutil.Process().create_time())
