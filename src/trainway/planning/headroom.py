"""Whether a rank's bytes fit on a device: the estimate, what comes on top of it, and a vLLM server that shares the GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainway.config.schema import RunConfig
from trainway.planning.advice import Advice, oom_advice
from trainway.planning.arithmetic import MemoryEstimate
from trainway.planning.facts import Model
from trainway.planning.geometry import Geometry, plan_memory
from trainway.planning.gpus import Gpu
from trainway.planning.measured import Measurement
from trainway.planning.rollout_time import cache_bytes_per_answer

GIB = 2**30
CONTEXT_BYTES = GIB
"""CUDA's context, its libraries' workspaces."""
NCCL_BYTES = GIB // 2
"""Buffers of the collectives, when there are several ranks."""
FRAGMENTATION = 0.04
"""Of the estimate: what the allocator holds and cannot give."""
SLEEPING_BYTES = 3 * GIB // 2
"""What a vLLM server keeps on a GPU that it shares while it sleeps: a context of its own."""
CPU_BYTES = GIB // 2
"""Python and its libraries, of each process on a CPU."""
RESTING = ("weights", "optimizer")
"""Parts of an estimate that stay on the GPU while a student answers elsewhere."""
CORRECTIONS = (0.5, 2.0)
"""A measured peak beyond these multiples of its plan was of something else."""


@dataclass(frozen=True)
class Headroom:
    """Bytes of one rank's device at its fullest moment. For a CPU all processes of the machine count together."""

    memory: MemoryEstimate
    correction: float
    """Measured over planned, of the nearest measurement; 1 without one."""
    allowance_bytes: int
    training_bytes: int
    """At the fullest moment of a pass through a model."""
    answering_bytes: int
    """While a vLLM server on the same GPU answers, beside the resting states; 0 without one."""
    server_bytes: int
    """Of that server; 0 without one."""
    device_bytes: int
    too_small: str = ""
    """Why the student's server cannot work at all, whatever else fits."""

    @property
    def peak_bytes(self) -> int:
        return max(self.training_bytes, self.answering_bytes)

    @property
    def is_answering(self) -> bool:
        """True where the fullest moment is when the server answers."""
        return self.answering_bytes > self.training_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.device_bytes and not self.too_small

    @property
    def free_bytes(self) -> int:
        return self.device_bytes - self.peak_bytes


def shares_gpu(config: RunConfig) -> bool:
    """True when a vLLM server of the run's own answers on the GPUs that train."""
    return (
        config.recipe == "gad"
        and config.gad.stage != "seqkd"
        and config.rollout.engine == "vllm"
        and config.rollout.url is None
    )


def judge(
    config: RunConfig,
    model: Model,
    memory: MemoryEstimate,
    gpu: Gpu,
    *,
    num_gpus: int,
    world_size: int,
    half: bool,
    measured: Measurement | None = None,
) -> Headroom:
    """Compare an estimate with a device. `num_gpus`: ranks of one machine."""
    correction = _correction(measured)
    if gpu.is_cpu:
        each = round((memory.total + memory.host) * correction) + CPU_BYTES
        return Headroom(memory, correction, CPU_BYTES, each * num_gpus, 0, 0, gpu.memory_bytes)
    total = round(memory.total * correction)
    fixed = CONTEXT_BYTES + NCCL_BYTES * (world_size > 1)
    allowance = fixed + round(FRAGMENTATION * total)
    training = total + allowance
    if not shares_gpu(config):
        return Headroom(memory, correction, allowance, training, 0, 0, gpu.memory_bytes)
    server = round(config.rollout.memory_share * gpu.memory_bytes)
    answering = resting_bytes(memory) + fixed + server
    too_small = "" if cache_bytes(config, model, gpu, half) > 0 else _no_room(config, model, gpu, half)
    training, allowance = training + SLEEPING_BYTES, allowance + SLEEPING_BYTES
    return Headroom(memory, correction, allowance, training, answering, server, gpu.memory_bytes, too_small)


def resting_bytes(memory: MemoryEstimate) -> int:
    """What stays on the GPU between the passes of a step."""
    return sum(getattr(memory, field.name) for field in fields(memory) if field.name in RESTING)


def cache_bytes(config: RunConfig, model: Model, gpu: Gpu, half: bool) -> float:
    """What one vLLM copy of the student has for keys and values; 0 where its longest sequence finds no room."""
    spread = config.rollout.tensor_parallel
    weights = (2 if half else 4) * model.total
    room = config.rollout.memory_share * gpu.memory_bytes * spread - weights - CONTEXT_BYTES * spread
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    return room if room >= cache_bytes_per_answer(model, longest, 2 if half else 4) else 0.0


def changes_that_help(
    config: RunConfig,
    model: Model,
    geometry: Geometry,
    found: Headroom,
    gpu: Gpu,
    half: bool,
) -> list[Advice]:
    """What to change when a run does not fit, the greatest saving first; each is a change by itself."""
    advice = oom_advice(config, model.shape, geometry, half_precision=half, on_cpu=gpu.is_cpu)
    if not shares_gpu(config):
        return advice
    advice = [item for item in advice if item.change != "lora=true"]  # a server takes whole models only
    if not found.is_answering:
        return advice
    # what helps at that moment is less that rests on the GPU, or a smaller share for the server
    fixed = found.answering_bytes - found.server_bytes
    share = int(100 * (gpu.memory_bytes - fixed) / gpu.memory_bytes) / 100
    helps = []
    smaller = config.rollout.model_copy(update={"memory_share": share})
    if share > 0 and cache_bytes(config.model_copy(update={"rollout": smaller}), model, gpu, half) > 0:
        saved = found.server_bytes - round(share * gpu.memory_bytes)
        helps.append(Advice(f"rollout.memory_share={share:g}", saved, "fewer answers at once"))
    if any(item.change == "engine.cpu_offload=all" for item in advice):
        engine = config.engine.model_copy(update={"cpu_offload": "all"})
        offloaded = config.model_copy(update={"engine": engine})
        other = plan_memory(offloaded, model.shape, geometry, half_precision=half)
        saved = resting_bytes(found.memory) - resting_bytes(other)
        helps.append(Advice("engine.cpu_offload=all", saved, "slower steps"))
    return sorted(helps, key=lambda item: -item.saves_bytes)


def _correction(measured: Measurement | None) -> float:
    if measured is None or measured.planned_bytes <= 0 or measured.peak_bytes <= 0:
        return 1.0
    ratio = measured.peak_bytes / measured.planned_bytes
    return ratio if CORRECTIONS[0] <= ratio <= CORRECTIONS[1] else 1.0


def _no_room(config: RunConfig, model: Model, gpu: Gpu, half: bool) -> str:
    weights = (2 if half else 4) * model.total / GIB
    spread, share = config.rollout.tensor_parallel, config.rollout.memory_share
    room = share * gpu.memory_gib * spread
    return (
        f"a vLLM server has {share:g} of {spread} x {gpu.memory_gib:g} GiB = {room:.0f} GiB, and the student's weights "
        f"are {weights:.0f}: raise rollout.tensor_parallel or rollout.memory_share"
    )


def parts(memory: MemoryEstimate) -> dict[str, int]:
    """The parts of an estimate on the device, by name, whatever fields it has."""
    return {
        field.name: value
        for field in fields(memory)
        if field.name != "host" and (value := int(getattr(memory, field.name)))
    }
