"""What every place a job can run at must be able to do: the seam between the verbs and the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trainway.config.schema import RunConfig
from trainway.jobs.orders import Orders, PodState
from trainway.jobs.record import Record
from trainway.jobs.spec import GpuChoice, JobSpec

Say = Callable[[str], None]
"""Takes one line for the user."""

MachineState = Literal["starting", "running", "stopped", "failed", "gone", "unknown"]


@dataclass(frozen=True)
class Job:
    """A job file, read and checked, with the run's configuration resolved for the job's machine."""

    spec: JobSpec
    config: RunConfig
    orders: Orders
    folder: str
    """Directory that the paths of `spec.upload` and `spec.source` are seen from."""


@dataclass(frozen=True)
class JobStatus:
    """A job now: the machine as the provider sees it, the work as the machine says it."""

    machine: MachineState
    detail: str = ""
    """The provider's own word, and why."""
    pod: PodState | None = None
    """None while the inside has not been heard of."""
    nodes: tuple[str, ...] = ()
    """One line for each node, where there are several."""


@dataclass(frozen=True)
class Cost:
    """What a job has cost: by the clock and its price, and by the provider's bill where there is one."""

    hours: float
    estimated: float
    """Dollars: hours x price."""
    billed: float | None = None
    """Dollars on the provider's bill so far; it may come an hour late."""
    note: str = ""


@dataclass(frozen=True)
class Stray:
    """A machine at the provider that Trainway has started and that no known job needs."""

    id: str
    name: str
    state: str
    dollars_per_hour: float
    why: str
    """e.g. `no job of this machine is called so`, `its job has ended`, `its deadline was two hours ago`."""


class Target(Protocol):
    """One place to run jobs at. Every method raises UserError; what could be done before it stays recorded."""

    def request(self, job: Job, record: Record) -> Any:
        """Exactly what `up` would send, as JSON-able data; nothing is sent and no network is used."""

    def up(self, job: Job, record: Record, say: Say) -> Record:
        """Rent or find the machine, bring the files there, start the orders. Called again after a failure it goes on, and
        never makes a second machine: what is at the provider under `record.remote_name` is this job's.

        A machine that does not come within `job.orders.limits.start_minutes` (see `trainway.jobs.waiting.Deadline`) is
        EnvironmentFault. What this call has rented is ended before that; a machine that was there already, and pods that
        a cluster's queue may still start, are left, and the error names what the provider says of them.
        """

    def status(self, record: Record) -> JobStatus: ...

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of all nodes, without their ends; a cut connection is made again without losing or repeating lines."""

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        """A shell, or one command, on the job's (first) machine; its exit code."""

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        """Make {port here: port there} reachable on 127.0.0.1 until interrupted."""

    def stop(self, record: Record, say: Say) -> Record:
        """Ask the training to save and end, and stop paying for GPUs; `up` goes on from there."""

    def down(self, record: Record, say: Say) -> Record:
        """End the machine and remove what was made for the job but its volume; verified at the provider."""

    def cost(self, record: Record) -> Cost: ...

    def strays(self, records: Sequence[Record]) -> list[Stray]: ...

    def end_stray(self, stray: Stray) -> None: ...


def chosen_gpu(job: Job) -> GpuChoice | None:
    """The first candidate, or None for a job without GPUs."""
    return job.spec.gpus[0] if job.spec.gpus else None
