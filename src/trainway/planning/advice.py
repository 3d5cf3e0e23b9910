"""What lowers the memory of a run, and by how much: one change at a time, each computed by the plan (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainway.config.schema import LoraConfig, RunConfig
from trainway.planning.geometry import Geometry, plan_memory
from trainway.planning.shapes import ModelShape

GIB = 2**30
SHORTEST_ROW = 256
"""Tokens of a row below which shortening it further is no advice."""
SMALLEST_CHUNK = 128
NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "logits": "loss",
    "gathered": "gathered shards",
    "communication": "buffers of gradients",
    "answers": "answers",
    "staging": "copy for saving",
}
"""What messages call the parts of an estimate."""


@dataclass(frozen=True)
class Advice:
    """One change, written as settings of the command line; the bytes that it saves on one rank; what it costs."""

    change: str
    saves_bytes: int
    costs: str = ""

    def __str__(self) -> str:
        costs = f" ({self.costs})" if self.costs else ""
        return f"{self.change} saves {self.saves_bytes / GIB:.2f} GiB{costs}"


def oom_advice(
    config: RunConfig,
    shape: ModelShape,
    geometry: Geometry,
    *,
    half_precision: bool | None = None,
    on_cpu: bool = False,
    ranks: int | None = None,
) -> list[Advice]:
    """The changes that save memory on one rank, each by itself, the greatest saving first.

    The global batch stays the same: a smaller micro-batch comes with more accumulation, and more accumulation alone,
    which saves nothing, is never among them.

    Args:
        on_cpu: the device is the CPU, so that its memory is the one that is short.
        ranks: processes that could share the model, if not those of `geometry`.
    """
    world = ranks or geometry.world_size

    def bytes_of(other: RunConfig, sizes: Geometry) -> int:
        return plan_memory(other, shape, sizes, half_precision=half_precision, on_cpu=on_cpu).total

    now = bytes_of(config, geometry)
    found = [
        Advice(change, now - bytes_of(other, sizes), costs)
        for change, costs, other, sizes in _candidates(config, geometry, world, on_cpu)
    ]
    useful = [advice for advice in found if advice.saves_bytes >= GIB // 100]
    return sorted(useful, key=lambda advice: -advice.saves_bytes)


def describe_memory(
    config: RunConfig,
    shape: ModelShape,
    geometry: Geometry,
    *,
    half_precision: bool | None = None,
    on_cpu: bool = False,
) -> str:
    """The plan's estimate of one rank in one line: `about 42.22 GiB: weights 38.98, ...`."""
    memory = plan_memory(config, shape, geometry, half_precision=half_precision, on_cpu=on_cpu)
    parts = sorted(
        ((NAMES[key], value) for key, value in asdict(memory).items() if key in NAMES),
        key=lambda part: -part[1],
    )
    shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts if value >= GIB // 100)
    host = f", and {memory.host / GIB:.2f} GiB of the CPU's memory" if memory.host else ""
    return f"about {memory.total / GIB:.2f} GiB a rank{': ' + shown if shown else ''}{host}"


Candidate = tuple[str, str, RunConfig, Geometry]


def _candidates(config: RunConfig, geometry: Geometry, world: int, on_cpu: bool) -> Iterator[Candidate]:
    yield from _smaller_batches(config, geometry)
    yield from _less_kept(config, geometry)
    yield from _sharded(config, geometry, world, on_cpu)
    yield from _adapters(config, geometry, on_cpu)


def _smaller_batches(config: RunConfig, geometry: Geometry) -> Iterator[Candidate]:
    if config.recipe == "gad":
        tokens, answers = config.gad.tokens_per_gpu // 2, config.rollout.batch_size // 2
        yield (
            f"gad.tokens_per_gpu={tokens}",
            "the same step",
            _with(config, "gad", tokens_per_gpu=tokens),
            geometry,
        )
        if answers and config.rollout.engine == "transformers":
            fewer = _with(config, "rollout", batch_size=answers)
            yield f"rollout.batch_size={answers}", "slower answers", fewer, geometry
        return
    rows, steps = geometry.micro_batch_size, geometry.grad_accum_steps
    sizes = {1, rows // 2} if rows % 2 == 0 else {1}
    for size in sorted(sizes - {0, rows}):
        accumulation = steps * rows // size
        smaller = replace(geometry, micro_batch_size=size, grad_accum_steps=accumulation)
        change = f"train.micro_batch_size={size} train.grad_accum_steps={accumulation}"
        yield change, "the same global batch", config, smaller
    if geometry.seq_len // 2 >= SHORTEST_ROW:
        length = geometry.seq_len // 2
        costs = "longer conversations lose their oldest turns" if config.recipe == "sft" else "shorter rows"
        yield f"train.seq_len={length}", costs, config, replace(geometry, seq_len=length)


def _less_kept(config: RunConfig, geometry: Geometry) -> Iterator[Candidate]:
    policies = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
    for policy in policies[config.train.activation_checkpointing]:
        costs = "a third more arithmetic" if policy == "full" else "a little more arithmetic"
        change = f"train.activation_checkpointing={policy}"
        yield change, costs, _with(config, "train", activation_checkpointing=policy), geometry
    chunk = max(SMALLEST_CHUNK, config.train.loss_chunk_tokens // 4)
    if chunk < config.train.loss_chunk_tokens:
        smaller = _with(config, "train", loss_chunk_tokens=chunk)
        yield f"train.loss_chunk_tokens={chunk}", "", smaller, geometry
    if config.model.attention == "eager":
        yield "model.attention=auto", "", _with(config, "model", attention="auto"), geometry


def _sharded(config: RunConfig, geometry: Geometry, world: int, on_cpu: bool) -> Iterator[Candidate]:
    engine = config.engine.name
    spread = replace(geometry, world_size=world)
    if world > 1 and engine in ("auto", "ddp", "zero2"):
        names = ["fsdp"] if config.optim.name == "muon" else ["fsdp", "zero3"]
        for name in names:
            kept = config.engine.cpu_offload
            if name == "fsdp" and kept == "optimizer":
                kept = "all"
            other = _with(config, "engine", name=name, cpu_offload=kept)
            change = f"engine.name={name}" + f" engine.cpu_offload={kept}" * (
                kept != config.engine.cpu_offload
            )
            yield change, f"over {world} ranks, more traffic", other, spread
    if engine == "fsdp" and config.engine.sharding == "hybrid" and world > 1:
        change = "engine.sharding=full" + " engine.shard_ranks=none" * (config.engine.shard_ranks is not None)
        whole = _with(config, "engine", sharding="full", shard_ranks=None)
        yield change, "more traffic", whole, spread
    if not on_cpu:
        offloads = {"fsdp": ("all",), "zero2": ("optimizer",), "zero3": ("optimizer", "all")}.get(engine, ())
        for offload in offloads:
            if offload != config.engine.cpu_offload and config.engine.cpu_offload != "all":
                change = f"engine.cpu_offload={offload}"
                yield change, "slower steps", _with(config, "engine", cpu_offload=offload), geometry


def _adapters(config: RunConfig, geometry: Geometry, on_cpu: bool) -> Iterator[Candidate]:
    lora = config.lora
    if config.model.path is not None and not lora.enabled:
        adapted = config.model_copy(update={"lora": LoraConfig(enabled=True)})
        yield "lora=true", "adapters instead of all weights", adapted, geometry
    elif (
        lora.enabled
        and lora.quantize == "none"
        and not on_cpu
        and config.engine.name in ("auto", "single", "ddp")
    ):
        yield "lora.quantize=4bit", "the extra qlora", _with(config, "lora", quantize="4bit"), geometry


def _with(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    """The configuration with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
