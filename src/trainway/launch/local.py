"""Training on this machine: in this process, or under torchrun when there are several devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import psutil

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, ExitCode
from trainway.launch.devices import gpu_environment, process_count
from trainway.launch.killed import killed_fault
from trainway.launch.network import communication_environment, doubtful_settings
from trainway.launch.nodes import ALONE, Meeting, plan_meeting
from trainway.launch.requirements import check_requirements
from trainway.logs import stage, start_logging, warn

if TYPE_CHECKING:  # the runtime import of torch waits until training really happens in this process
    from trainway.training.session import RunResult

ResumeChoice = Literal["auto", "never"] | int
PrepareProgress = Callable[[str, int, int], None]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PARENT = "TRAINWAY_PARENT"
"""Tells an agent, and its ranks, which process has started them."""
KILLED = 128 + signal.SIGKILL
"""Exit code of an agent one of whose ranks SIGKILL has ended."""
SHUTDOWN_S = 600
"""Time that ranks have to save when they are asked to stop."""
_GRACE_S = 5.0  # for an agent without ranks: there is nothing to save
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
        EnvironmentFault: a library is missing, or a rank was killed, most likely because memory ran out.
    """
    loaded = load_config(source, overrides)
    config = loaded.config
    first = not under_launcher()
    if first:
        _refuse_push(config)
    again = ["train", str(source), *overrides, "--resume", str(resume)]
    code = spread(config, again + ["--allow-changes"] * allow_changes, torchrun_args)
    if code is None:
        train_here(
            config,
            resume=resume,
            allow_changes=allow_changes,
            progress=progress,
            origins=loaded.origins,
            checked=first,
        )
    return code or 0


def spread(config: RunConfig, arguments: Sequence[str], torchrun_args: Sequence[str]) -> int | None:
    """Run `trainway <arguments>` in the processes that `config` asks for, and return the exit code; None when this
    process is all of them, or one of them.

    Raises:
        EnvironmentFault: a library is missing, or a rank was killed, most likely because memory ran out.
    """
    if under_launcher():
        return None
    check_requirements(config)
    count = process_count(config.engine)
    chosen = gpu_environment(config.engine)
    meeting = plan_meeting(torchrun_args, count, config.engine)
    if count == 1 and meeting.nodes == 1 and not torchrun_args:
        return None
    start_logging(config.log.level, is_main=True)
    code = run_processes(count, arguments, torchrun_args, meeting, chosen)
    if code == KILLED:
        raise killed_fault(config, count * meeting.nodes)
    return code


def train_here(
    config: RunConfig,
    *,
    resume: ResumeChoice = "auto",
    allow_changes: bool = False,
    progress: PrepareProgress | None = None,
    origins: Mapping[str, str] = MappingProxyType({}),
    checked: bool = False,
) -> RunResult:
    """Train in this process, which is the whole run or one rank of it; then rank 0 releases, if that is planned.

    Args:
        origins: of the settings, for the report.
        checked: whether it is known that a planned release can be made; else rank 0 sees to that first.
    """
    settle_environment(config)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main and not checked and PARENT not in os.environ:  # our own launching command has seen to it
        _refuse_push(config)
    how: dict[str, Any] = {
        "resume": resume,
        "allow_changes": allow_changes,
        "progress": progress,
        "origins": origins,
    }
    result = _train(config, how)
    if is_main and config.release.push_to_hub:
        from trainway.release.publish import release_after_training

        released = release_after_training(result.run_dir, config, lambda line: stage("RELEASE", line))
        stage("RELEASE", f"{released.url} (revision {released.revision})")
    return result


def _train(config: RunConfig, how: dict[str, Any]) -> RunResult:
    match config.recipe:
        case "pretrain":
            from trainway.recipes.pretrain import pretrain

            return pretrain(config, **how)
        case "sft":
            from trainway.recipes.sft import sft

            return sft(config, **how)
        case "gad":
            from trainway.recipes.gad import gad

            return gad(config, **how)


def _refuse_push(config: RunConfig) -> None:
    """Before the first step: raise EnvironmentFault where a planned release could not be made at the end."""
    if config.release.push_to_hub:
        from trainway.release.readiness import refuse_push

        refuse_push(config)


def settle_environment(config: RunConfig) -> None:
    """Set what torch and its libraries read when they begin: the GPUs to use, and how machines talk to each other."""
    if config.engine.gpus:
        os.environ.update(gpu_environment(config.engine))  # before torch looks for devices
    if spans_nodes() and PARENT not in os.environ:  # our own launching command has seen to it
        start_logging(config.log.level, is_main=os.environ["RANK"] == "0")
        os.environ.update(_shown(communication_environment()))


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """True in a process that torchrun (or another launcher with its variables) has started."""
    return all(name in environ for name in _TORCHRUN_VARIABLES)


def spans_nodes(environ: Mapping[str, str] = os.environ) -> bool:
    """True in a rank of a run that has ranks on other machines too."""
    local = environ.get("LOCAL_WORLD_SIZE", "")
    return under_launcher(environ) and local != "" and local != environ["WORLD_SIZE"]


def run_processes(
    nproc: int,
    arguments: Sequence[str],
    torchrun_args: Sequence[str] = (),
    meeting: Meeting = ALONE,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run `trainway <arguments>` in `nproc` processes under torchrun; returns the run's exit code.

    SIGINT and SIGTERM are passed on: the ranks save a checkpoint and end with exit code 75. So does a run that has
    nothing to save yet. KILLED: SIGKILL has ended a rank, and nobody here has asked for an end.

    Args:
        environment: variables for the ranks, beside those of this process.

    Raises:
        ConfigError: a torchrun argument contradicts ours.
    """
    if any(arg.split("=")[0].replace("_", "-") == "--nproc-per-node" for arg in torchrun_args):
        raise ConfigError(
            "--nproc-per-node is set twice", "Trainway sets it from --nproc", "leave it out after --"
        )
    command = [
        sys.executable,
        "-m",
        "trainway.launch.agent",
        *meeting.arguments,
        f"--nproc-per-node={nproc}",
        *torchrun_args,
    ]
    command += ["-m", "trainway", *arguments]
    # A session of its own: Ctrl-C reaches the ranks once, through us, and not torchrun behind their back.
    agent = subprocess.Popen(
        command, start_new_session=True, env={**_agent_environment(meeting), **environment}
    )
    stop = _Stop(agent)
    previous = {name: signal.signal(name, stop.on_signal) for name in STOP_SIGNALS}
    try:
        return stop.exit_code()
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


class _Stop:
    """Passes a request to stop on to the ranks of an agent, straight to them: so it reports how they really ended."""

    def __init__(self, agent: subprocess.Popen[bytes]) -> None:
        self.agent = agent
        self.asked = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        ranks = self._ranks()
        for process in ranks:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        if not ranks:
            self.agent.terminate()
            # While torchrun waits for other nodes it hears no signal, and has nothing to save.
            timer = threading.Timer(_GRACE_S, lambda: None if self._ranks() else self.agent.kill())
            timer.daemon = True
            timer.start()
        self.asked = True

    def exit_code(self) -> int:
        """Wait for the end; 75 too when the run was asked to stop before it had anything to save."""
        code = self.agent.wait()
        unsaved = code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
        if self.asked and code == KILLED:
            return ExitCode.INTERNAL
        return ExitCode.STOPPED if self.asked and unsaved else code

    def _ranks(self) -> list[psutil.Process]:
        try:
            found: list[psutil.Process] = psutil.Process(self.agent.pid).children()
            return found
        except psutil.NoSuchProcess:
            return []


def _agent_environment(meeting: Meeting) -> dict[str, str]:
    # Ranks get ten minutes to save before torchrun ends them; its own default of 30 s is short for a large model.
    told = communication_environment(master=meeting.master) if meeting.nodes > 1 else {}
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S),
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **_shown(told),
        PARENT: str(os.getpid()),
    }


def _shown(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The same environment, told to the user, with what is doubtful in theirs."""
    for note in doubtful_settings():
        warn(note)
    if environment:
        stage("DDP", "set " + ", ".join(f"{name}={value}" for name, value in environment.items()))
    return environment
