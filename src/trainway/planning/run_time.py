"""How long a run takes: its steps by stage, and what comes beside them (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from trainway.planning.disk import Disk, num_saves
from trainway.planning.gad import Stage, stage_names
from trainway.planning.geometry import Geometry
from trainway.planning.headroom import cache_bytes
from trainway.planning.rollout_time import answer_seconds
from trainway.planning.timing import Efficiency, Job, StepTime, gad_step, supervised_step

WRITE_GB_S = 1.0
"""At which a checkpoint reaches the disk."""


def step_times(job: Job, work: Efficiency | None) -> dict[str, StepTime]:
    """Seconds of a step, by stage of gad; else one, under the recipe's name. Empty where nothing is known."""
    if work is None:
        return {}
    if job.config.recipe != "gad":
        return {job.config.recipe: supervised_step(job, work)}
    room = _cache_bytes(job)
    return {name: gad_step(job, work, name, room) for name in stage_names(job.config.gad)}


def run_seconds(
    stages: Sequence[Stage] | None, geometry: Geometry, times: dict[str, StepTime]
) -> tuple[float | None, float | None]:
    """(seconds of a mean step, of all steps), as far as they are known; without lengths the last stage's step."""
    if not times:
        return None, None
    if geometry.total_steps is None:
        return list(times.values())[-1].seconds, None
    if stages is None:
        (time,) = times.values()
        return time.seconds, time.seconds * geometry.total_steps
    seconds = sum(stage.steps * times[stage.name].seconds for stage in stages)
    return seconds / geometry.total_steps, seconds


def seconds_beside(job: Job, work: Efficiency, disk: Disk) -> float:
    """Seconds of all evaluations and saves of a run whose length is known."""
    config, geometry = job.config, job.geometry
    assert geometry.total_steps is not None
    each = 0.0
    if config.recipe == "gad" and not job.gpu.is_cpu:
        prompts = max(1, config.eval.num_prompts // config.rollout.num_per_prompt)
        each = answer_seconds(
            config,
            job.model,
            job.gpu,
            geometry.world_size,
            job.precision,
            prompts=prompts,
            prompt=config.data.max_prompt_tokens * job.fill,
            answer=config.data.max_response_tokens * job.fill,
            cache_bytes=_cache_bytes(job),
        )
    elif config.recipe != "gad" and config.eval.max_tokens is not None:
        peak = job.gpu.peak_flops(job.precision) or work.gemm_flops
        forward = job.model.forward_flops(geometry.seq_len)
        each = config.eval.max_tokens * forward / (geometry.world_size * peak * work.mfu)
    evaluations = -(-geometry.total_steps // config.eval.every)
    writing = 0.0 if config.checkpoint.async_save else disk.each_checkpoint / (WRITE_GB_S * 1e9)
    return evaluations * each + (num_saves(config, geometry) or 0) * writing


def _cache_bytes(job: Job) -> float:
    return cache_bytes(job.config, job.model, job.gpu, job.precision != "fp32")
