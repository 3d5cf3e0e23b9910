"""What the machine is told to do, and where it keeps what it knows of the job: the contract between outside and inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from trainway.config.schema import NonNegativeFloat, Section
from trainway.jobs.spec import JobName, Limits, Release

ORDERS_VARIABLE = "TRAINWAY_ORDERS"
"""Holds the orders as JSON where no file can be given: on RunPod."""

Ender = Literal["exit", "runpod", "command"]
"""How the machine ends itself. exit: its process ends, and the scheduler takes the machine back; runpod: by the API;
command: by a command of the user's."""
Stage = Literal["upload", "doctor", "prepare", "train", "release", "sync", "end", "ended"]
Outcome = Literal["done", "failed", "stopped", "stalled", "deadline", "budget"]


class Orders(Section):
    """All that the inside of a job needs to know. No secret is in it."""

    version: Literal[1] = 1
    """Of this form."""
    job: JobName
    """Its name."""
    token: str = ""
    """Of this `up`: a job that has ended without being done is taken up again under another one, never under the same."""
    config: dict[str, Any]
    """The run's settings, resolved, every place seen from the root; as `trainway.config.files.config_values` gives them."""
    root: str
    """The volume on this machine; the stages run there."""
    boot: bool = False
    """Run the boot stages before the training."""
    inputs: tuple[str, ...] = ()
    """Text to shard in the boot stages."""
    nodes: PositiveInt = 1
    """Machines of the job."""
    processes: PositiveInt | None = None
    """Processes on this node; empty means one for each GPU, or one."""
    awaits_upload: bool = False
    """Wait for the file `JobDir.uploaded` before anything else."""
    limits: Limits
    """With `hours` set."""
    dollars_per_hour: NonNegativeFloat = 0.0
    """Of all machines together; 0 when nothing is paid by the hour."""
    release: Release = Release()
    """Export at the end."""
    sync: str | None = None
    """Where the run is copied to while it goes on."""
    machine: Literal["terminate", "stop", "keep"] = "terminate"
    """What to do with the machine at the end."""
    ender: Ender = "exit"
    """How."""
    end_command: tuple[str, ...] = ()
    """For the ender `command`."""
    guard_every_s: PositiveFloat = 10.0
    """How often the guard looks."""


class PodState(Section):
    """What the inside last knew of itself; written to `JobDir.state` at every change and at least once a minute."""

    job: str
    """Its name."""
    stage: Stage
    """What it is at."""
    outcome: Outcome | None = None
    """How the training ended; empty while it goes on."""
    reason: str = ""
    """In words, for the user."""
    began: float
    """When the first start was, in seconds since 1970; restarts do not change it."""
    updated: float
    """When this was written."""
    orders: str = ""
    """Which orders this is about: a hash of them."""
    attempts: int = 0
    """Starts of the training so far."""
    crashes: int = 0
    """Of the training, since it last saved a step."""
    exit_code: int | None = None
    """Of the last stage that failed."""
    step: int = 0
    """Optimiser steps done."""
    saved_step: int = 0
    """The newest of them that is saved."""
    total_steps: int = 0
    """Optimiser steps in all; 0 when not known yet."""
    dollars: float = 0.0
    """Spent so far, by the price in the orders and the clock since the first start."""
    incomplete: bool = False
    """Whether a release or a copy that was asked for is missing; the machine's disk is not given up then."""
    machine_ended: bool = False
    """Whether the provider has confirmed that the machine ends."""


@dataclass(frozen=True)
class JobDir:
    """The files of a job on its own volume. Nothing else spells these names."""

    path: Path

    @classmethod
    def of(cls, root: str | Path, job: str) -> JobDir:
        return cls(Path(root).expanduser() / "jobs" / job)

    def node(self, rank: int) -> JobDir:
        """The files of one node: several may share a volume. The first node's are the job's."""
        return self if rank == 0 else JobDir(self.path / f"node-{rank}")

    @property
    def orders(self) -> Path:
        return self.path / "orders.json"

    @property
    def config(self) -> Path:
        """The run's configuration, written from the orders."""
        return self.path / "config.yaml"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def log(self) -> Path:
        """All that the stages say, over restarts."""
        return self.path / "log.txt"

    @property
    def uploaded(self) -> Path:
        """There once every promised file has arrived."""
        return self.path / "uploaded"

    @property
    def secrets(self) -> Path:
        """Variables with secret values, mode 600; only where the target has no better place. Removed once read."""
        return self.path / "secrets.env"

    @property
    def lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.path / "job.lock"

    @property
    def exported(self) -> Path:
        """The released model, before it is copied to where it was promised."""
        return self.path / "model"

    @property
    def stop_request(self) -> Path:
        """There when the user has asked for a stop: no restart after it."""
        return self.path / "stop"
