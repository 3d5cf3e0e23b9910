"""Out of memory, told as what was asked for, what the run takes, and what would make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainway.config.schema import RunConfig
from trainway.engines.precision import choose_precision
from trainway.engines.world import World
from trainway.errors import EnvironmentFault
from trainway.planning.advice import describe_memory, oom_advice
from trainway.planning.geometry import Geometry
from trainway.planning.shapes import ModelShape

MOST_ADVICE = 6
_REFUSED_BY_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


@contextmanager
def memory_advice(
    config: RunConfig, shape: ModelShape | None, geometry: Geometry, world: World
) -> Iterator[None]:
    """Turn running out of memory into an error that names the settings to change; wrap building and training in it.

    `shape`: of the model; None when it is not known, and then what helps is named without figures.

    Raises:
        EnvironmentFault: memory ran out, on the device or on the machine.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise memory_fault(config, shape, geometry, world, error) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSED_BY_CPU):
            raise
        raise memory_fault(config, shape, geometry, world, error) from error


def memory_fault(
    config: RunConfig, shape: ModelShape | None, geometry: Geometry, world: World, error: BaseException
) -> EnvironmentFault:
    """The error to raise for `error`, with the plan's breakdown and the changes that save most, best first."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    half = choose_precision(config.train.precision, world.device) != "fp32"
    where = f"the memory of {world.device}" if on_gpu else "the machine's memory"
    if shape is None:
        return EnvironmentFault(
            f"rank {world.rank}: {where} is full{_asked_for(str(error))}",
            "the model's shape is not known, so there is no breakdown",
            "lower train.micro_batch_size with more train.grad_accum_steps, train.seq_len, or set "
            "train.activation_checkpointing=full",
        )
    on_cpu = world.device.type == "cpu"
    advice = oom_advice(config, shape, geometry, half_precision=half, on_cpu=on_cpu)
    best = [str(item) for item in advice[:MOST_ADVICE]]
    return EnvironmentFault(
        f"rank {world.rank}: {where} is full{_asked_for(str(error))}",
        f"the plan: {describe_memory(config, shape, geometry, half_precision=half, on_cpu=on_cpu)}",
        "; ".join(best)
        if best
        else "use a device with more memory, a smaller model, or more ranks with engine.name=fsdp",
    )


def _asked_for(message: str) -> str:
    """`, asked for 2.00 GiB` by what torch says of CUDA's memory or the CPU's; empty when it says nothing."""
    if found := re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", message):
        return f", asked for {found[1]} more"
    if found := re.search(r"tried to allocate (\d+) bytes", message):
        return f", asked for {int(found[1]) / 2**30:.2f} GiB more"
    return ""
