"""A benchmark of a configuration: its real steps for a while, what they take, and what the whole run will take."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainway.config.schema import RunConfig
from trainway.data.turns import Progress
from trainway.engines import engine_name
from trainway.errors import ConfigError, Stopped
from trainway.files import disk_faults
from trainway.planning.forecast import Forecast, count_events
from trainway.recipes.bench_gad import bench_gad
from trainway.recipes.bench_result import BenchResult, Memory, Part
from trainway.recipes.bench_steps import Bench, Found
from trainway.recipes.bench_supervised import bench_supervised
from trainway.recipes.gad import find_discriminator
from trainway.recipes.measuring import keep, measurement, over_ranks, planned_bytes
from trainway.recipes.opening import run_recipe
from trainway.recipes.pretrain import openings
from trainway.recipes.sft import questions
from trainway.training.session import Session
from trainway.training.shutdown import StopSignal
from trainway.training.speed import Pace, device_name

NEVER = 1 << 60
"""Steps between evaluations, and between saves, while steps are measured."""


def bench(
    config: RunConfig,
    *,
    steps: int = 100,
    gpu_price: float | None = None,
    trace: str | Path | None = None,
    record: bool = True,
    progress: Progress | None = None,
    began: float | None = None,
) -> BenchResult:
    """Take `steps` steps of the run that `config` describes, and forecast it whole; see `BenchResult`.

    The steps are the recipe's own, without evaluations and saves: the longest batch first, two of the usual ones to
    warm up, then those that are timed. One evaluation and one save follow, shortened where they are long. The run's
    directory is not touched, and nothing is left behind but the prepared data, the trace and the measurement.

    Args:
        gpu_price: USD of one GPU (without any: of the machine) for an hour.
        trace: where rank 0 writes a Chrome trace of two more steps; .json or .json.gz.
        record: keep the measurement for later plans, see `planning.measured`.
        progress: told (label, bytes done, bytes in all) while model and data are prepared.
        began: when the program started, by the clock of time.time(); empty means now.

    Raises:
        ConfigError: a setting or an argument does not do.
        EnvironmentFault: memory ran out, with what the plan says and what would make the run fit.
        Stopped: SIGTERM or SIGINT came.
    """
    began = time.time() if began is None else began
    trace = _check(steps, gpu_price, trace)
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch(config))
        asked = Bench(config, steps, scratch, trace)
        critic = find_discriminator(config) if config.recipe == "gad" else None

        def measure(session: Session, stop: StopSignal) -> BenchResult:
            match config.recipe:
                case "gad":
                    found = bench_gad(session, stop, critic, asked)
                case "sft":
                    found = bench_supervised(session, questions, stop, asked)
                case _:
                    found = bench_supervised(session, openings, stop, asked)
            start_s = found.ready - began - session.preparing_s
            return _result(session, asked, found, start_s, gpu_price, record)

        try:
            result = run_recipe(_quiet(config, scratch), measure, resume="never", progress=progress)
        except Stopped:
            raise Stopped(saved="a benchmark saves nothing") from None
    assert isinstance(result, BenchResult), "a new directory holds no finished run"
    return result


def _check(steps: int, gpu_price: float | None, trace: str | Path | None) -> Path | None:
    """The trace's path. Raises ConfigError for arguments that do not do, before anything is begun."""
    if steps < 1:
        raise ConfigError(
            f"--steps is {steps}", "there is nothing to measure", "use 1 or more, e.g. --steps 20"
        )
    if gpu_price is not None and not 0 <= gpu_price < float("inf"):
        raise ConfigError(f"--gpu-price is {gpu_price}", "it is USD for an hour", "e.g. --gpu-price 2.99")
    if trace is None:
        return None
    path = Path(trace)
    if not path.name.endswith((".json", ".json.gz")):
        raise ConfigError(
            f"--trace is {trace}", "a Chrome trace is JSON", "name a file that ends in .json or .json.gz"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--trace is {trace}", f"there is no directory {path.parent}", "make it first")
    return path


@contextmanager
def _scratch(config: RunConfig) -> Iterator[Path]:
    """A directory on the file system of the run, which saves are measured on; rank 0 makes it and takes it away."""
    place = Path(config.run_dir).absolute().parent if config.run_dir else Path(config.runs_dir).absolute()
    while not place.is_dir():
        place = place.parent
    if os.environ.get("RANK", "0") != "0":
        yield place  # rank 0 says where
        return
    with disk_faults(place):
        made = Path(tempfile.mkdtemp(prefix=".trainway-bench-", dir=place))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _quiet(config: RunConfig, scratch: Path) -> RunConfig:
    """The same run in a directory below `scratch`, where nothing is due but steps."""
    checkpoint = config.checkpoint.model_copy(update={"save_every": NEVER, "save_each_epoch": False})
    return config.model_copy(
        update={
            "run_dir": str(scratch / "run"),
            "checkpoint": checkpoint,
            "eval": config.eval.model_copy(update={"every": NEVER}),
            "tracking": config.tracking.model_copy(update={"report_to": ()}),
        }
    )


def _result(
    session: Session, asked: Bench, found: Found, start_s: float, gpu_price: float | None, record: bool
) -> BenchResult:
    """All figures together; the same on every rank but for the times of its own phases."""
    config, world, built = asked.config, session.world, found.built
    peaks = [int(value) for value in over_ranks(world, found.peak_bytes)]
    firsts = [int(value) for value in over_ranks(world, found.first_peak_bytes)]
    parts = tuple(found.parts)
    planned = planned_bytes(session, built)
    if world.is_main and record:
        last = parts[-1]
        pace = Pace(last.steps, last.step_s.median, last.tokens_per_step)
        flops = found.flops_per_token
        path = keep(
            measurement(session, built, pace, flops, peaks, source="bench", gemm_flops=found.gemm_flops)
        )
    else:
        path = None
    return BenchResult(
        recipe=config.recipe,
        device=device_name(world.device),
        world_size=world.world_size,
        engine=engine_name(config, world),
        precision=built.precision,
        parameters=built.census.total,
        trainable=built.census.trainable,
        warm_up_steps=asked.warm_up,
        parts=parts,
        flops_per_token=found.flops_per_token or None,
        gemm_flops=found.gemm_flops,
        memory=Memory(max(peaks), max(firsts), tuple(peaks), planned or None),
        forecast=_forecast(session, asked, found, start_s, gpu_price),
        trace=None if asked.trace is None else str(asked.trace),
        measurement=path,
    )


def _forecast(
    session: Session, asked: Bench, found: Found, start_s: float, gpu_price: float | None
) -> Forecast:
    world = session.world
    evaluations, saves = count_events(
        asked.config, session.total_steps, session.geometry.steps_per_epoch, found.ends
    )
    machines = -(-world.world_size // world.local_world_size)
    return Forecast(
        steps=session.total_steps,
        steps_s=found.steps_s,
        evaluations=evaluations,
        evaluation_s=found.evaluation_s,
        evaluation_basis=found.evaluation_basis,
        saves=saves,
        save_s=found.save.stall_s,
        last_save_s=found.save.seconds,
        save_bytes=found.save.bytes,
        save_basis=found.save.basis,
        start_s=start_s,
        gpus=world.world_size if world.device.type == "cuda" else machines,
        gpu_price=gpu_price,
    )


__all__ = ["BenchResult", "Forecast", "Memory", "Part", "bench"]
