"""How long a step takes: arithmetic by an assumed or measured share of the peak, bytes by the links, answers by the
memory's bandwidth (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainway.config.schema import RunConfig
from trainway.planning.facts import Model
from trainway.planning.geometry import Geometry, shard_count
from trainway.planning.gpus import Gpu
from trainway.planning.measured import Measurement, Work, nearest
from trainway.planning.rollout_time import answer_seconds

LINK_SHARE = 0.7
"""Of a link's speed that large collectives reach."""
HIDDEN = 0.9
"""Share of the shorter of arithmetic and traffic that the longer one hides."""
FABRIC_GB_S, ETHERNET_GB_S = 50.0, 3.0
"""Between nodes, per GPU and direction: 400 Gbit/s of fabric for each GPU of a node with NVLink; 200 Gbit/s for a whole
node of eight else."""
NVLINK_GB_S = 100.0
"""A link within the node that is faster than this is no PCIe."""
LAUNCH_S = 0.4e-3
"""Of one block, forward and backward: about 80 kernels at 5 µs. No step is faster than the program that starts it."""
HOST_LINK_GB_S, HOST_ADAM_GB_S = 20.0, 20.0
"""Per rank, under cpu_offload: between the memories, and what the optimiser reads and writes in the CPU's."""
ADAM_BYTES = 28
"""Read and written for a parameter: weight, gradient and two moments read, weight and moments written, in fp32."""
FILL_UNKNOWN = 0.5
"""Of the longest row or answer: what is assumed where rows are padded and their lengths are not known."""


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that the arithmetic reaches, and why it is believed."""

    mfu: float
    kind: Literal["measured", "modelled"]
    source: str
    gemm_flops: float = 0.0
    """FLOP/s that stand for the peak of a device without a data sheet."""
    covers_all: bool = False
    """It is of whole steps, traffic and answers included."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step; `parts` are by name and may overlap, `flops` are of all ranks."""

    seconds: float
    parts: dict[str, float]
    flops: float
    tokens: float


@dataclass(frozen=True)
class Job:
    """What a step is of, and where."""

    config: RunConfig
    model: Model
    geometry: Geometry
    gpu: Gpu
    num_nodes: int
    precision: str
    fill: float
    """Share of a row's positions that hold tokens; of gad, length of prompts and answers over their limits."""


PUBLISHED_MFU: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("mixture", (), 0.28, "NeMo AutoModel, gpt-oss-20b on 8 x H100: 13,100 tokens/s per GPU"),
    ("adapters", (), 0.38, "NeMo AutoModel, LoRA of Llama-3-8B on H100: 12,500 tokens/s at 4 N"),
    ("dense", ("A100-40", "A100-80"), 0.60, "llm-foundry, 1.3B and 2.7B on A100-80: 60 to 62 %"),
    ("dense", (), 0.40, "OLMo-core and llm-foundry, 1B to 2.7B on H100: 39 to 42 %"),
)  # fmt: skip
"""(kind of work, GPUs that it was measured on; empty: all others, share of the dense bf16 peak, source); the first that
applies. All without recomputation. They are what others have published: one measurement of one's own replaces them."""


def efficiency(config: RunConfig, model: Model, gpu: Gpu, found: Sequence[Measurement], world_size: int,
               precision: str) -> Efficiency | None:  # fmt: skip
    """What share of the peak to expect: of the nearest measurement on such a device, else the published one.

    None for a CPU of which nothing is measured.
    """
    measured = nearest(found, gpu, work_of(config, model, world_size, precision))
    if measured is not None and (mfu := measured.mfu(gpu)):
        ratio = recomputing(config)
        if measured.checkpointing != config.train.activation_checkpointing:
            mfu *= ratio / _recomputing(measured.checkpointing, adapted=measured.is_adapted)
        return Efficiency(
            min(mfu, 1.0),
            "measured",
            str(measured),
            gemm_flops=measured.gemm_flops if gpu.is_cpu else 0.0,
            covers_all=config.recipe == "gad" or measured.world_size == world_size,
        )
    if gpu.is_cpu:
        return None
    kind = "mixture" if model.is_mixture else "adapters" if config.lora.enabled else "dense"
    mfu, source = next(
        (share, source)
        for name, gpus, share, source in PUBLISHED_MFU
        if name == kind and (not gpus or gpu.name in gpus)
    )
    ratio = recomputing(config)
    if ratio < 1:
        policy = config.train.activation_checkpointing
        source += f"; {mfu:.0%}, less what train.activation_checkpointing={policy} computes twice"
    return Efficiency(mfu * ratio, "modelled", source)


def work_of(config: RunConfig, model: Model, world_size: int, precision: str) -> Work:
    """What is compared with measurements."""
    return Work(
        recipe=config.recipe,
        family=model.shape.family,
        parameters=model.total,
        is_adapted=config.lora.enabled,
        is_mixture=model.is_mixture,
        precision=precision,
        checkpointing=config.train.activation_checkpointing,
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        world_size=world_size,
    )


def recomputing(config: RunConfig) -> float:
    """Useful share of the arithmetic: full checkpointing repeats the forward pass, 2 N beside 6 N, or 4 N of adapters."""
    return _recomputing(config.train.activation_checkpointing, adapted=config.lora.enabled)


def _recomputing(policy: str, *, adapted: bool) -> float:
    useful = 4 if adapted else 6
    return {"full": useful / (useful + 2), "selective": 0.95}.get(policy, 1.0)


def supervised_step(job: Job, work: Efficiency) -> StepTime:
    """A step of pretrain or sft."""
    geometry = job.geometry
    tokens = geometry.tokens_per_step * job.fill
    flops = tokens * job.model.training_flops(geometry.seq_len)
    passes = geometry.grad_accum_steps
    arithmetic = _arithmetic(job, work, flops, passes)
    if work.covers_all:
        return StepTime(arithmetic, {"step": arithmetic}, flops, tokens)
    traffic, offload = _traffic(job, passes), _offload(job)
    parts = {"arithmetic": arithmetic, "communication": traffic, "offload": offload}
    seconds = _overlapped(arithmetic, traffic) + offload
    return StepTime(seconds, {name: value for name, value in parts.items() if value}, flops, tokens)


def gad_step(job: Job, work: Efficiency, stage: str, cache_bytes: float) -> StepTime:
    """A step of a stage of gad: the answers, their scores, the discriminator's step, the student's.

    `cache_bytes`: what one copy of the student has for keys and values while it answers.
    """
    config, model, geometry, fill = job.config, job.model, job.geometry, job.fill
    world, gad, data = geometry.world_size, config.gad, config.data
    prompts, answers = geometry.global_batch_size, config.rollout.num_per_prompt
    prompt, answer = data.max_prompt_tokens * fill, data.max_response_tokens * fill
    length = prompt + answer
    trained = model.training_flops(round(length))
    forward = model.forward_flops(round(length))
    head = model.counts.embedding
    own, all_of_it = prompts * answers * length, prompts * (answers + 1) * length
    teacher = prompts * length
    flops: dict[str, float] = {}
    if stage == "seqkd":
        flops["student"] = teacher * trained
    else:
        flops["score"] = all_of_it * (forward - 2 * head)
        flops["discriminator"] = all_of_it * (trained - (4 if config.lora.enabled else 6) * head)
        flops["student"] = teacher * trained
    if stage == "adversarial":
        passes = trained + (forward if gad.kl_coef else 0.0) + (forward if gad.prompts_per_update else 0.0)
        flops["student"] = own * passes
    done = teacher if stage == "seqkd" else all_of_it
    if work.covers_all:
        seconds = _arithmetic(job, work, sum(flops.values()), 1)
        return StepTime(seconds, {"step": seconds}, sum(flops.values()), done)
    parts: dict[str, float] = {}
    if stage != "seqkd":
        parts["rollout"] = answer_seconds(
            config, model, job.gpu, world, job.precision, prompts=prompts, prompt=prompt, answer=answer, cache_bytes=cache_bytes
        )  # fmt: skip
    for name, count in flops.items():
        tokens = teacher if name == "student" and stage != "adversarial" else all_of_it
        batches, trains = max(1, math.ceil(tokens / (world * gad.tokens_per_gpu))), name != "score"
        traffic = _traffic(job, batches, trains=trains)
        parts[name] = _overlapped(_arithmetic(job, work, count, batches), traffic) + _offload(job) * trains
    return StepTime(sum(parts.values()), parts, sum(flops.values()), done)


def _arithmetic(job: Job, work: Efficiency, flops: float, passes: int) -> float:
    """Seconds of some FLOPs over all ranks; never less than it takes to start the kernels of each rank's passes."""
    peak = job.gpu.peak_flops(job.precision) or work.gemm_flops
    busy = flops / (job.geometry.world_size * peak * work.mfu)
    if job.gpu.is_cpu or work.kind == "measured":
        return busy
    return max(busy, passes * job.model.num_layers * LAUNCH_S)


def _traffic(job: Job, passes: int, *, trains: bool = True) -> float:
    """Seconds of one step's collectives, each GPU sending at its slowest link; rings send (n - 1) / n of a tensor."""
    world, num_nodes, gpu = job.geometry.world_size, job.num_nodes, job.gpu
    if world == 1:
        return 0.0
    total, trained = job.model.total, job.model.trained
    engine, size = job.config.engine, 4 if job.precision == "fp32" else 2
    shards = shard_count(engine, world)
    within = gpu.link_gb_s
    between = FABRIC_GB_S if gpu.link_gb_s > NVLINK_GB_S else ETHERNET_GB_S
    slowest = min(within, between) if num_nodes > 1 else within
    if shards is None:
        return _seconds(2 * 4 * trained * trains, world, slowest)
    if engine.name == "zero2":
        return _seconds((passes * 4 + size) * trained * trains, world, slowest)
    gathers = (2 if engine.reshard_after_forward or engine.name == "zero3" else 1) if trains else 1
    in_group = min(shards, world)
    link = within if num_nodes > 1 and in_group <= world // num_nodes else slowest
    seconds = _seconds(passes * (gathers * size * total + 4 * trained * trains), in_group, link)
    if in_group < world and trains:  # hybrid: the groups' gradients are summed
        seconds += _seconds(passes * 2 * 4 * trained / in_group, world // in_group, slowest)
    return seconds


def _seconds(moved: float, ranks: int, link_gb_s: float) -> float:
    return moved * (ranks - 1) / ranks / (link_gb_s * 1e9 * LINK_SHARE)


def _offload(job: Job) -> float:
    """Seconds of the optimiser in the CPU's memory, and of gradients and weights on their way there and back."""
    shards = shard_count(job.config.engine, job.geometry.world_size)
    if shards is None or job.config.engine.cpu_offload == "none":
        return 0.0
    trained, size = job.model.trained, 4 if job.precision == "fp32" else 2
    moved = trained * (4 + size) / shards / (HOST_LINK_GB_S * 1e9)
    return moved + trained * ADAM_BYTES / shards / (HOST_ADAM_GB_S * 1e9)


def _overlapped(one: float, other: float) -> float:
    return max(one, other) + (1 - HIDDEN) * min(one, other)
