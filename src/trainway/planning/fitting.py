"""On which GPUs of the catalogue a run fits, how many of them, and what it would cost there: cheapest first (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trainway.config.schema import LoraConfig, RunConfig
from trainway.errors import ConfigError
from trainway.planning.arithmetic import MemoryEstimate
from trainway.planning.facts import Model
from trainway.planning.geometry import plan_memory, resolve_geometry
from trainway.planning.gpus import GPUS, Gpu
from trainway.planning.headroom import judge, shares_gpu
from trainway.planning.plan import Basis, Fit, check_ranks, plan_on, planned_precision

MOST_NODES = 32
LESS_SHARE = 0.4
"""Of a GPU, for a vLLM server where the configured share leaves training too little."""
GIB = 2**30

Cache = dict[tuple[str, str, bool, int, str], MemoryEstimate | None]
"""Bytes of a rank by engine, offload, adapters, ranks and precision: all that the candidates here differ in."""


def find_fits(basis: Basis) -> list[Fit]:
    """For each GPU of the catalogue the smallest number that the run fits on, cheapest first, those without a price last.

    As it is configured; where no number of GPUs helps because each holds everything, with engine.name=fsdp. Where
    nothing of the catalogue fits, with one or more of the changes of `_rescues`. Numbers by which the global batch does
    not divide are left out, and those whose machines have too little memory beside the GPUs for what is offloaded.
    """
    cache: Cache = {}
    found = _fits_of(basis, list(_variants(basis.config)), cache)
    for rescue in _rescues(basis.config):
        if found:
            break
        found = _fits_of(basis, [rescue], cache)
    return sorted(found, key=_order)


def _fits_of(basis: Basis, variants: list[tuple[str, RunConfig]], cache: Cache) -> list[Fit]:
    found = []
    for gpu in GPUS:
        fits = (_smallest(basis, config, change, gpu, cache) for change, config in variants)
        if (fit := next(filter(None, fits), None)) is not None:
            found.append(fit)
    return found


def _order(fit: Fit) -> tuple[bool, float, float]:
    """By dollars of the run, else of a step; without a price by GPU-hours."""
    if fit.usd_per_hour is None or fit.step_s is None:
        return True, 0.0, (fit.step_s or 0.0) * fit.num_gpus * fit.num_nodes
    return False, fit.dollars if fit.dollars is not None else fit.step_s * fit.usd_per_hour, 0.0


def _variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The configuration, and the same with its states spread over the ranks, where they are not."""
    yield "", config
    if config.engine.name in ("auto", "single", "ddp", "zero2"):
        offload = "all" if config.engine.cpu_offload != "none" else "none"
        engine = config.engine.model_copy(update={"name": "fsdp", "cpu_offload": offload, "ds_config": None})
        if config.lora.quantize == "none":
            yield "engine.name=fsdp", config.model_copy(update={"engine": engine})


def _rescues(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """What lets a run fit that fits nowhere as it is, from what changes it least."""
    _, spread = list(_variants(config))[-1]
    names = [f"engine.name={spread.engine.name}"] if spread.engine.name != config.engine.name else []
    engine = spread.engine.model_copy(update={"cpu_offload": "all"})
    changes: list[tuple[list[str], RunConfig]] = []
    if shares_gpu(config):
        rollout = config.rollout.model_copy(update={"memory_share": LESS_SHARE})
        changes.append(
            ([*names, f"rollout.memory_share={LESS_SHARE}"], spread.model_copy(update={"rollout": rollout}))
        )
    if spread.engine.name in ("fsdp", "zero3"):
        changes.append(([*names, "engine.cpu_offload=all"], spread.model_copy(update={"engine": engine})))
    if config.recipe == "sft" and not config.lora.enabled:
        changes.append(([*names, "lora=true"], spread.model_copy(update={"lora": LoraConfig(enabled=True)})))
    for words, changed in changes:
        yield " ".join(words), changed


def _worlds(gpu: Gpu, config: RunConfig) -> Iterator[tuple[int, int]]:
    """(GPUs of a node, nodes), from the smallest."""
    counts = [1] if config.engine.name == "single" else [1, 2, 4, 8]
    yield from ((count, 1) for count in counts if count <= gpu.node_gpus)
    nodes = 2
    while config.engine.name != "single" and nodes <= MOST_NODES:
        yield gpu.node_gpus, nodes
        nodes *= 2


def _smallest(
    basis: Basis,
    config: RunConfig,
    change: str,
    gpu: Gpu,
    cache: Cache,
) -> Fit | None:
    precision = planned_precision(config, gpu)
    for num_gpus, num_nodes in _worlds(gpu, config):
        world = num_gpus * num_nodes
        memory = _memory(basis, config, world, precision, cache)
        if memory is None or not _is_allowed(config, gpu, num_gpus, num_nodes):
            continue
        headroom = judge(
            config, basis.model, memory, gpu, num_gpus=num_gpus, world_size=world, half=precision != "fp32"
        )
        has_room = memory.host <= gpu.host_gib * GIB or not gpu.host_gib
        if headroom.fits and has_room:
            fit = _fit(_changed(basis, config), gpu, num_gpus, num_nodes, change, memory)
            if fit is not None:
                return fit
    return None


def _is_allowed(config: RunConfig, gpu: Gpu, num_gpus: int, num_nodes: int) -> bool:
    try:
        check_ranks(config, gpu, num_gpus, num_nodes)
    except ConfigError:
        return False
    return True


def _memory(
    basis: Basis,
    config: RunConfig,
    world: int,
    precision: str,
    cache: Cache,
) -> MemoryEstimate | None:
    """One rank's bytes; None where the batch does not divide by so many ranks, or they exceed its rows."""
    key = config.engine.name, config.engine.cpu_offload, config.lora.enabled, world, precision
    if key not in cache:
        try:
            geometry = resolve_geometry(config, world, basis.rows.count if basis.rows else None)
            cache[key] = plan_memory(config, basis.model.shape, geometry, half_precision=precision != "fp32")
        except ConfigError:
            cache[key] = None
    return cache[key]


def _changed(basis: Basis, config: RunConfig) -> Basis:
    model = basis.model if config.lora is basis.config.lora else Model(basis.model.shape, config.lora)
    return replace(basis, config=config, model=model)


def _fit(
    basis: Basis, gpu: Gpu, num_gpus: int, num_nodes: int, change: str, memory: MemoryEstimate
) -> Fit | None:
    found = plan_on(basis, gpu, num_gpus, num_nodes, memory)
    if not found.fits:  # by a measurement that corrects the estimate
        return None
    return Fit(
        gpu=gpu.name,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        change=change,
        peak_bytes=found.headroom.peak_bytes,
        device_bytes=found.headroom.device_bytes,
        step_s=found.step_s,
        hours=found.hours,
        dollars=found.dollars,
        usd_per_hour=found.dollars_per_hour,
    )
