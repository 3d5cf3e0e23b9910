"""Which GPUs of this machine a run uses, and how many processes that makes."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping

from trainway.config.schema import EngineConfig
from trainway.errors import ConfigError, EnvironmentFault

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that a process would see, as CUDA_VISIBLE_DEVICES names them; without it, the machine's by number."""
    told = environ.get(VISIBLE)
    if told is not None:
        return [part.strip() for part in told.split(",") if part.strip() not in ("", "-1")]
    return [str(number) for number in range(_machine_gpus())]


def process_count(engine: EngineConfig, environ: Mapping[str, str] = os.environ) -> int:
    """How many processes to start here: one for the single engine, else as asked for or one per GPU."""
    if engine.name == "single":
        return 1
    if engine.nproc != "auto":
        return engine.nproc
    return max(1, len(engine.gpus) or len(visible_gpus(environ)))


def gpu_environment(engine: EngineConfig, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the run's processes where engine.gpus chooses among the GPUs; else nothing.

    Raises:
        ConfigError: a GPU is named that CUDA_VISIBLE_DEVICES hides, or there are more processes than GPUs.
        EnvironmentFault: a GPU is named that the machine does not have.
    """
    seen = visible_gpus(environ)
    chosen = [str(number) for number in engine.gpus]
    missing = [number for number in chosen if number not in seen]
    if missing and environ.get(VISIBLE):
        raise ConfigError(
            f"engine.gpus names {', '.join(missing)}",
            f"{VISIBLE} shows {', '.join(seen)} alone",
            f"name GPUs out of these, or set {VISIBLE} alone and leave engine.gpus empty",
        )
    if missing:
        shows = f"GPUs 0 to {len(seen) - 1}" if seen else "no GPU"
        raise EnvironmentFault(
            f"engine.gpus names {', '.join(missing)}",
            f"this machine shows {shows}",
            "correct engine.gpus; `nvidia-smi -L` lists the GPUs",
        )
    count, available = process_count(engine, environ), len(chosen or seen)
    if seen and count > available:
        raise ConfigError(
            f"{count} processes are asked for, with {available} GPU{'s' * (available > 1)}",
            "each process drives one GPU",
            f"use engine.nproc={available}, or hide the GPUs with {VISIBLE}= to train on the CPU",
        )
    return {VISIBLE: ",".join(chosen)} if chosen else {}


@functools.cache
def _machine_gpus() -> int:
    """GPUs of this machine; asked once, because it takes a second on a large one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
