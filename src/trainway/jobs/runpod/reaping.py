"""Machines that Trainway has started and that nobody needs any more: found by name, by deadline, and by their silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trainway.jobs.orders import PodState
from trainway.jobs.origin import known_origin
from trainway.jobs.record import Record
from trainway.jobs.runpod import place
from trainway.jobs.runpod.machines import Machine, end_machine, list_machines
from trainway.jobs.runpod.place import Kind
from trainway.jobs.target import Stray

if TYPE_CHECKING:
    from trainway.jobs.runpod.api import Api

Inside = Callable[[Record, Machine], tuple[PodState | None, str]]
"""What the inside of a machine says, and why it says nothing."""
QUIET_MINUTES = 30.0
"""The inside speaks once a minute; one that has said nothing for so long is not there. As long has a new one to begin."""
BUSY_PERCENT = 5
"""Of a GPU: what computes is left alone, whether it speaks or not."""
CLUSTER = "cluster/"
"""Before the id of a stray that is a cluster."""


def strays_of(api: Api, records: Sequence[Record], inside: Inside) -> list[Stray]:
    """Every machine under a name of Trainway's that no known job needs, and why.

    One without a job here is told only when it was started from here: others use the account too.
    """
    known = {record.remote_name: record for record in records if record.target == "runpod"}
    found: list[Stray] = []
    for machine in list_machines(api):
        record = known.get(machine.name)
        why = _why(api.clock.now(), machine, record, inside)
        if why:
            name = f"{CLUSTER}{machine.id}" if machine.kind == "cluster" else machine.id
            found.append(Stray(name, machine.name, machine.status, machine.dollars_per_hour, why))
    return found


def end_stray(api: Api, stray: Stray) -> None:
    """End it, verified at RunPod."""
    kind: Kind = "cluster" if stray.id.startswith(CLUSTER) else "pod"
    end_machine(api, kind, stray.id.removeprefix(CLUSTER))


def _why(now: float, machine: Machine, record: Record | None, inside: Inside) -> str:
    """Why nobody needs it; empty when its job does."""
    if record is None:
        return "no job of this machine is called so" if machine.origin == known_origin() else ""
    if record.phase == "ended":
        return "its job has ended"
    known = place.machine_id(record)
    if known is not None and known != machine.id:
        return f"its job has another machine, {known}"
    began = min((float(span["began"]) for span in place.spans(record)), default=machine.created)
    hours = record.limit_hours
    if hours is not None and now > (deadline := began + hours * 3600):
        return f"its deadline was {_duration(now - deadline)} ago"
    old = now - machine.created > QUIET_MINUTES * 60
    if record.phase == "asked" and known is None:
        return "its start was never finished" if old else ""
    if machine.status != "RUNNING":
        return ""
    return _idle(now, machine, old, *inside(record, machine))


def _idle(now: float, machine: Machine, old: bool, state: PodState | None, silence: str) -> str:
    if state is not None and state.stage == "ended":
        return f"its work has ended: {state.outcome or 'no outcome'}, and the machine has not"
    if not old or _is_busy(machine):
        return ""
    if state is None:
        return f"it has been up for {_duration(now - machine.created)}, computes nothing, and does not answer ({silence or 'no state'})"
    if now - state.updated > QUIET_MINUTES * 60:
        return f"its inside was last heard of {_duration(now - state.updated)} ago, and it computes nothing"
    return ""


def _is_busy(machine: Machine) -> bool:
    used = [gpu.util or 0 for pod in machine.pods if pod.runtime is not None for gpu in pod.runtime.gpus]
    return any(util >= BUSY_PERCENT for util in used)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
