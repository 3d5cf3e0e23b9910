"""What to say when a process of a run was killed from outside: most often the machine's memory was full."""

from __future__ import annotations

from trainway.config.schema import RunConfig
from trainway.errors import EnvironmentFault
from trainway.launch.devices import visible_gpus
from trainway.planning.advice import GIB, describe_memory, oom_advice
from trainway.planning.geometry import plan_memory, planned_shape, resolve_geometry

AGAIN = "the same command goes on from the last checkpoint"


def killed_fault(config: RunConfig, world_size: int) -> EnvironmentFault:
    """The error for a rank of `world_size` that SIGKILL has ended, with what the run takes and what would lower it."""
    what = "a process of the run was killed from outside (SIGKILL)"
    usual = "the kernel does that when the machine's memory is full"
    shape = planned_shape(config)
    if shape is None:
        return EnvironmentFault(
            what, usual, f"{AGAIN}; with more memory, or fewer processes, if it happens again"
        )
    geometry = resolve_geometry(config, world_size)
    if visible_gpus():
        host = plan_memory(config, shape, geometry).host
        takes = f"the plan puts {host / GIB:.2f} GiB a rank there, beside data and copies of checkpoints"
        cure = (
            "use fewer processes, checkpoint.async_save=false, a smaller engine.cpu_offload, or more memory"
        )
        return EnvironmentFault(what, f"{usual}; {takes}", f"{AGAIN}; if it happens again: {cure}")
    half = config.train.precision in ("bf16", "fp16")  # auto is fp32 on CPUs
    advice = oom_advice(config, shape, geometry, half_precision=half, on_cpu=True)
    cure = "; ".join(str(item) for item in advice[:4]) or "use fewer processes, or a machine with more memory"
    plan = describe_memory(config, shape, geometry, half_precision=half, on_cpu=True)
    takes = f"the plan: {plan}, of {world_size} ranks"
    return EnvironmentFault(what, f"{usual}; {takes}", f"{AGAIN}; if it happens again: {cure}")
