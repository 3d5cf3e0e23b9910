"""What is recorded of a run's or a benchmark's steps, so that later plans know this machine."""

from __future__ import annotations

import time
from typing import Literal

from trainway.engines import engine_name
from trainway.engines.world import World
from trainway.errors import EnvironmentFault
from trainway.logs import warn
from trainway.planning.geometry import plan_memory
from trainway.planning.measured import Measurement, record
from trainway.recipes.model import RunModel, run_shape
from trainway.training.session import Session
from trainway.training.speed import MemoryMark, Pace, SpeedMeter, device_name

FEWEST_STEPS = 10
"""A launch of fewer steps, its warm-up left out, says too little to be recorded."""


def measurement(
    session: Session,
    built: RunModel,
    pace: Pace,
    flops_per_token: float,
    peaks: list[int],
    *,
    source: Literal["bench", "run"],
    gemm_flops: float = 0.0,
) -> Measurement:
    """What was measured. `peaks`: bytes of each rank; `gemm_flops`: of one device."""
    config, geometry, world = session.config, session.geometry, session.world
    shape = run_shape(session)
    return Measurement(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        source=source,
        device=device_name(world.device),
        world_size=world.world_size,
        engine=engine_name(config, world),
        recipe=config.recipe,
        family=shape.family if shape else "",
        parameters=built.census.total,
        trainable=built.census.trainable,
        micro_batch_size=geometry.micro_batch_size,
        seq_len=geometry.seq_len,
        checkpointing=config.train.activation_checkpointing,
        attention=str(built.model.config._attn_implementation),
        precision=built.precision,
        flops_per_step=flops_per_token * pace.tokens_per_step,
        step_s=pace.step_s,
        tokens_per_step=pace.tokens_per_step,
        peak_bytes=max(peaks),
        planned_bytes=planned_bytes(session, built),
        gemm_flops=gemm_flops,
    )


def planned_bytes(session: Session, built: RunModel) -> int:
    """What the plan says that one rank takes of its device's memory; 0 for a model whose shape it does not know."""
    shape = run_shape(session)
    if shape is None:
        return 0
    half, on_cpu = built.precision != "fp32", session.world.device.type == "cpu"
    return plan_memory(session.config, shape, session.geometry, half_precision=half, on_cpu=on_cpu).total


def over_ranks(world: World, value: float) -> list[float]:
    """Every rank's value, by rank; the same on every rank."""
    return world.sum(*(value * (rank == world.rank) for rank in range(world.world_size)))


def record_run(session: Session, built: RunModel, meter: SpeedMeter, mark: MemoryMark) -> None:
    """Record the steps of a launch that has finished a run; every rank calls it together."""
    peaks = [int(peak) for peak in over_ranks(session.world, mark.above())]
    pace = meter.pace()
    if not session.world.is_main or pace is None or pace.steps < FEWEST_STEPS:
        return
    keep(measurement(session, built, pace, meter.flops_per_token, peaks, source="run"))


def keep(found: Measurement) -> str | None:
    """Write a measurement; where, or None when it cannot be written: nothing that was asked for depends on it."""
    try:
        return str(record(found))
    except (OSError, EnvironmentFault) as error:
        warn(f"the measurement of these steps is not kept: {str(error).splitlines()[0]}")
        return None
