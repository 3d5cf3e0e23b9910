"""Batch geometry: how rows spread over micro-batches, ranks, steps and epochs, computed once for the whole run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainway.config.schema import EngineConfig, RunConfig, ScheduleConfig
from trainway.errors import ConfigError
from trainway.planning.arithmetic import (
    MemoryEstimate,
    count_parameters,
    flops_per_token,
    padded_vocab_size,
)
from trainway.planning.gad import gad_stages
from trainway.planning.gad_memory import gad_memory
from trainway.planning.memory import EngineName, memory_bytes, staging_bytes
from trainway.planning.published import published_shape
from trainway.planning.shapes import ModelShape, new_shape, shape_in


@dataclass(frozen=True)
class Geometry:
    """Sizes of one run. Batch sizes count rows; `global_batch_size` is micro_batch_size x grad_accum_steps x ranks."""

    world_size: int
    micro_batch_size: int
    grad_accum_steps: int
    global_batch_size: int
    seq_len: int
    tokens_per_step: int
    total_steps: int | None
    """None: train.epochs decides, and the number of rows is not known yet."""
    steps_per_epoch: int | None
    epochs: float | None
    """Passes over the training rows; None when the number of rows is not known and only total_steps is set."""


def resolve_geometry(config: RunConfig, world_size: int, rows_per_epoch: int | None = None) -> Geometry:
    """The batch and the length of the run on `world_size` ranks; `rows_per_epoch` is the rows of the training split.

    Steps per epoch are rows / global_batch_size to the nearest whole step, at least 1. Raises ConfigError when the
    global batch does not divide evenly, when it disagrees with grad_accum_steps, when the warm-up outlasts the run or
    overlaps with the decay of wsd.
    """
    if world_size < 1:
        raise ConfigError(
            f"the number of ranks is {world_size}", "a run has at least one process", "use 1 or more"
        )
    if config.recipe == "gad":
        return _gad_geometry(config, world_size, rows_per_epoch)
    train = config.train
    accumulation = _accumulation(config, world_size)
    global_batch = train.micro_batch_size * accumulation * world_size
    steps_per_epoch = None
    total_steps, epochs = train.total_steps, train.epochs
    if rows_per_epoch is not None:
        if rows_per_epoch < 1:
            raise ConfigError(
                "the training split has no rows", "there is nothing to train on", "check data.train"
            )
        steps_per_epoch = max(1, round(rows_per_epoch / global_batch))
        if total_steps is None and epochs is not None:
            total_steps = max(1, round(epochs * rows_per_epoch / global_batch))
        elif total_steps is not None:
            epochs = total_steps * global_batch / rows_per_epoch
    if total_steps is not None:
        _check_schedule(config.schedule, "the run", total_steps, global_batch)
    return Geometry(
        world_size=world_size,
        micro_batch_size=train.micro_batch_size,
        grad_accum_steps=accumulation,
        global_batch_size=global_batch,
        seq_len=train.seq_len,
        tokens_per_step=global_batch * train.seq_len,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
    )


def _gad_geometry(config: RunConfig, world_size: int, rows_per_epoch: int | None) -> Geometry:
    """Of gad: a step takes prompts, and how their answers are spread over ranks follows from their lengths."""
    prompts = config.train.global_batch_size
    if prompts is None:
        raise ConfigError(
            "train.global_batch_size is not set",
            "it is the number of prompts of one step",
            "set e.g. train.global_batch_size=256",
        )
    stages = gad_stages(config, rows_per_epoch)
    for stage in stages or ():
        _check_schedule(config.schedule, f"stage {stage.name}", stage.steps, prompts)
    total = stages[-1].last if stages else None
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    return Geometry(
        world_size=world_size,
        micro_batch_size=1,
        grad_accum_steps=1,
        global_batch_size=prompts,
        seq_len=longest,
        tokens_per_step=prompts * longest,
        total_steps=total,
        steps_per_epoch=None if rows_per_epoch is None else max(1, round(rows_per_epoch / prompts)),
        epochs=None if rows_per_epoch is None or total is None else total * prompts / rows_per_epoch,
    )


def _check_schedule(schedule: ScheduleConfig, what: str, steps: int, rows: int) -> None:
    if warmup_steps(schedule, steps) >= steps:
        raise ConfigError(
            f"schedule.warmup_steps is {schedule.warmup_steps}",
            f"{what} has only {steps} steps of {rows} rows",
            f"set schedule.warmup_steps={steps // 10}, or train for more steps",
        )
    if overlap := decay_overlap(schedule, steps):
        raise overlap


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up: as given, or warmup_ratio of the run to the nearest whole step."""
    if schedule.warmup_ratio is None:
        return schedule.warmup_steps
    return min(round(schedule.warmup_ratio * total_steps), total_steps - 1)


def decay_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps over which wsd decays: the last decay_ratio of the run to the nearest whole step, at least 1."""
    return max(1, round(schedule.decay_ratio * total_steps))


def decay_overlap(schedule: ScheduleConfig, total_steps: int) -> ConfigError | None:
    """What is wrong when wsd would begin to decay before it has warmed up; None when nothing is."""
    falling, warming = decay_steps(schedule, total_steps), warmup_steps(schedule, total_steps)
    if schedule.name != "wsd" or warming + falling <= total_steps:
        return None
    cures = [f"schedule.warmup_steps={min(total_steps // 10, total_steps - falling)}"]
    if ratio := math.floor(1e4 * (total_steps - warming) / total_steps) / 1e4:
        cures.append(f"schedule.decay_ratio={ratio:g}")
    return ConfigError(
        f"schedule.warmup_steps {warming} and the {falling} steps of schedule.decay_ratio "
        f"{schedule.decay_ratio:g} overlap",
        f"the run has only {total_steps} steps, and wsd decays after its warm-up",
        f"set {' or '.join(cures)}, or train for more steps",
    )


def shard_count(engine: EngineConfig, world_size: int) -> int | None:
    """Ranks over which fsdp, zero2 or zero3 cuts a model's states; None under another engine."""
    if engine.name not in ("fsdp", "zero2", "zero3"):
        return None
    hybrid = engine.name == "fsdp" and engine.sharding == "hybrid"
    return engine.shard_ranks or world_size if hybrid else world_size


def planned_ranks(config: RunConfig) -> int:
    """Ranks as far as the configuration decides them: engine.nproc where it is a number, else 1."""
    return config.engine.nproc if isinstance(config.engine.nproc, int) else 1


def planned_vocab_size(config: RunConfig) -> int | None:
    """Rows of the embedding as far as the configuration decides them; None when a tokenizer has to be read first."""
    if config.model.path is not None:
        return None
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return None if config.tokenizer.path is not None else padded_vocab_size(config.tokenizer.vocab_size)


def planned_shape(config: RunConfig, vocab_size: int | None = None) -> ModelShape | None:
    """The shape of the run's model as far as it is known without a download: a new model's, that of a local directory
    or of a model in `planning.published`; else None. `vocab_size`: rows of a new model's embedding, if known.

    Raises:
        DataError: the directory's config.json is malformed.
    """
    if config.model.path is not None:
        return shape_in(config.model.path) or published_shape(config.model.path)
    vocab = vocab_size or planned_vocab_size(config)
    return None if vocab is None else new_shape(config.model, vocab)


def plan_memory(
    config: RunConfig,
    shape: ModelShape,
    geometry: Geometry,
    *,
    half_precision: bool | None = None,
    on_cpu: bool = False,
) -> MemoryEstimate:
    """Bytes of one rank at the highest point of a step.

    Args:
        half_precision: empty follows train.precision, `auto` counting as bf16.
        on_cpu: the run computes on the CPU, with our own blocks in fp32 and one memory for everything.
    """
    engine = config.engine
    half = config.train.precision != "fp32" if half_precision is None else half_precision
    shards = shard_count(engine, geometry.world_size)
    whole: EngineName = "single" if geometry.world_size == 1 else "ddp"
    gad = config.recipe == "gad"

    def estimate(model: ModelShape, rows: int, length: int) -> MemoryEstimate:
        return memory_bytes(
            model,
            micro_batch_size=rows,
            seq_len=length,
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            accumulates=gad or geometry.grad_accum_steps > 1,
            optimizer=config.optim.name,
            checkpointing=config.train.activation_checkpointing,
            half_precision=half,
            on_cpu=on_cpu,
            shards=shards,
            engine=engine.name if engine.name in ("fsdp", "zero2", "zero3") else whole,
            cpu_offload=engine.cpu_offload,
            lora=config.lora,
            eager_attention=config.model.attention == "eager",
            documents=config.data.packing == "documents",
        )

    if gad:
        found = gad_memory(config, shape, shards or 1, half, lambda model, tokens: estimate(model, 1, tokens))
    else:
        found = estimate(shape, geometry.micro_batch_size, geometry.seq_len)
    if not config.checkpoint.async_save:
        return found
    staged = staging_bytes(config, shape, shards or 1)
    return replace(found, staging=staged) if on_cpu else replace(found, host=found.host + staged)


def describe_plan(
    config: RunConfig,
    world_size: int = 1,
    vocab_size: int | None = None,
    rows_per_epoch: int | None = None,
    *,
    half_precision: bool | None = None,
) -> dict[str, Any]:
    """What a run takes, as plain JSON values: geometry, parameters, FLOPs per token, bytes of one rank.

    `vocab_size`: rows of a new model's embedding; empty takes `planned_vocab_size`. Where the model's shape is not
    known (see `planned_shape`), everything that depends on it is None. `half_precision`: as in `plan_memory`. Raises
    ConfigError as `resolve_geometry` does.
    """
    geometry = resolve_geometry(config, world_size, rows_per_epoch)
    shape = planned_shape(config, vocab_size)
    plan: dict[str, Any] = {
        "geometry": asdict(geometry),
        "vocab_size": shape.vocab_size if shape else vocab_size or planned_vocab_size(config),
        "parameters": None,
        "flops_per_token": None,
        "memory_bytes": None,
        "total_tokens": None
        if geometry.total_steps is None
        else geometry.total_steps * geometry.tokens_per_step,
    }
    if config.recipe == "gad":
        stages = gad_stages(config, rows_per_epoch)
        plan["stages"] = None if stages is None else [asdict(stage) for stage in stages]
    if shape is None:
        return plan
    counts = count_parameters(shape, lora=config.lora)
    memory = plan_memory(config, shape, geometry, half_precision=half_precision)
    plan["parameters"] = {"total": counts.total, "embedding": counts.embedding}
    if counts.active != counts.total:
        plan["parameters"]["active"] = counts.active
    if config.lora.enabled:
        plan["parameters"]["trainable"] = counts.trainable
    plan["flops_per_token"] = flops_per_token(shape, context=geometry.seq_len, lora=config.lora)
    plan["memory_bytes"] = {**asdict(memory), "total": memory.total}
    return plan


def _accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank per step."""
    train = config.train
    rows = train.micro_batch_size * world_size
    if train.global_batch_size is None:
        return train.grad_accum_steps or 1
    if train.grad_accum_steps is not None and train.grad_accum_steps * rows != train.global_batch_size:
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} disagrees with train.grad_accum_steps "
            f"{train.grad_accum_steps}",
            f"{train.micro_batch_size} rows x {train.grad_accum_steps} x {world_size} ranks = "
            f"{train.grad_accum_steps * rows}",
            "leave one of the two empty",
        )
    if train.global_batch_size % rows:
        below = train.global_batch_size // rows * rows
        nearest = [str(size) for size in (below, below + rows) if size]
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not divisible by "
            f"{train.micro_batch_size} rows x {world_size} ranks",
            "every rank takes whole micro-batches, the same number each",
            f"use train.global_batch_size={' or '.join(nearest)}, or another train.micro_batch_size",
        )
    return train.global_batch_size // rows
