"""Training on this machine: in this process, or under torchrun when there are several devices."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from trainway.config.load import load_config
from trainway.config.schema import EngineConfig, RunConfig
from trainway.errors import ConfigError

if TYPE_CHECKING:  # the runtime import of torch waits until training really happens in this process
    from trainway.training.session import RunResult

ResumeChoice = Literal["auto", "never"] | int
PrepareProgress = Callable[[str, int, int], None]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def start_training(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: ResumeChoice = "auto",
    allow_changes: bool = False,
    torchrun_args: Sequence[str] = (),
    progress: PrepareProgress | None = None,
) -> int:
    """Train what CONFIG says; in this process, or in several under torchrun. Returns the exit code.

    Args:
        progress: told (label, bytes done, bytes in all) while the data is prepared in this process.

    Raises:
        UserError, Stopped: as the recipe, when it runs in this process.
    """
    config = load_config(source, overrides).config
    if not under_launcher():
        count = process_count(config.engine)
        if count > 1 or torchrun_args:
            again = ["train", str(source), *overrides, "--resume", str(resume)]
            return run_processes(count, again + ["--allow-changes"] * allow_changes, torchrun_args)
    train_here(config, resume=resume, allow_changes=allow_changes, progress=progress)
    return 0


def train_here(
    config: RunConfig,
    *,
    resume: ResumeChoice = "auto",
    allow_changes: bool = False,
    progress: PrepareProgress | None = None,
) -> RunResult:
    """Train in this process, which is the whole run or one rank of it."""
    from trainway.recipes.pretrain import pretrain

    match config.recipe:
        case "pretrain":
            return pretrain(config, resume=resume, allow_changes=allow_changes, progress=progress)


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """True in a process that torchrun (or another launcher with its variables) has started."""
    return all(name in environ for name in _TORCHRUN_VARIABLES)


def process_count(engine: EngineConfig, environ: Mapping[str, str] = os.environ) -> int:
    """How many processes to start here: one for the single engine, else as asked for or one per visible GPU."""
    if engine.name == "single":
        return 1
    if engine.nproc != "auto":
        return engine.nproc
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return max(1, sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))


def run_processes(nproc: int, arguments: Sequence[str], torchrun_args: Sequence[str] = ()) -> int:
    """Run `trainway <arguments>` in `nproc` processes under torchrun; returns the run's exit code.

    SIGINT and SIGTERM are passed on: the ranks save a checkpoint and end with exit code 75.

    Raises:
        ConfigError: a torchrun argument contradicts ours.
    """
    if any(arg.split("=")[0].replace("_", "-") == "--nproc-per-node" for arg in torchrun_args):
        raise ConfigError(
            "--nproc-per-node is set twice", "Trainway sets it from --nproc", "leave it out after --"
        )
    rendezvous = (
        []
        if any(arg.startswith(("--nnodes", "--rdzv", "--master")) for arg in torchrun_args)
        else ["--standalone"]
    )
    command = [
        sys.executable,
        "-m",
        "trainway.launch.agent",
        *rendezvous,
        f"--nproc-per-node={nproc}",
        *torchrun_args,
    ]
    command += ["-m", "trainway", *arguments]
    # A session of its own: Ctrl-C reaches the ranks once, through us, and not torchrun behind their back.
    agent = subprocess.Popen(command, start_new_session=True, env=_agent_environment())
    previous = {name: signal.signal(name, lambda number, frame: _stop_ranks(agent)) for name in STOP_SIGNALS}
    try:
        return agent.wait()
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _stop_ranks(agent: subprocess.Popen[bytes]) -> None:
    # Straight to the ranks, past torchrun: so it reports how they really ended.
    try:
        ranks = psutil.Process(agent.pid).children()
    except psutil.NoSuchProcess:
        return
    for process in ranks:
        process.terminate()
    if not ranks:
        agent.terminate()


def _agent_environment() -> dict[str, str]:
    # Ranks get ten minutes to save before torchrun ends them; its own default of 30 s is short for a large model.
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "TRAINWAY_PARENT": str(os.getpid()),
    }
