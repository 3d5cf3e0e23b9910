"""The machines at RunPod, a pod or a cluster of pods alike: found, waited for, and ended so that nothing bills on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainway.errors import EnvironmentFault
from trainway.jobs.record import Record
from trainway.jobs.runpod.api import Api, Lost, Refused
from trainway.jobs.runpod.models import ORIGIN_VARIABLE, PREFIX, Cluster, Pod, PodStatus
from trainway.jobs.runpod.place import Kind
from trainway.jobs.target import Say
from trainway.jobs.waiting import Deadline

POLL_S = 5.0
END_ATTEMPTS = 8
_OUR_NAME = re.compile(rf"{PREFIX}[a-z0-9]([a-z0-9-]{{0,43}}[a-z0-9])?-[0-9a-f]{{8}}")
"""As `Record.remote_name` makes it; what somebody has called `trainway-test` by hand is his."""


@dataclass(frozen=True)
class Machine:
    """One pod, or the pods of one cluster, the first node first."""

    kind: Kind
    id: str
    name: str
    pods: tuple[Pod, ...]
    wanted: int
    """Pods that there are to be."""
    created: float
    """Seconds since 1970."""

    @property
    def status(self) -> PodStatus:
        """The one of all pods, or the one that is furthest from RUNNING."""
        found = [pod.status for pod in self.pods]
        if self.kind == "cluster" and "TERMINATED" in found:
            return "ERROR"  # the others wait for a node that does not come back
        for status in ("ERROR", "EXITED", "PROVISIONING", "STARTING", "RUNNING"):
            if status in found:
                return "PROVISIONING" if status == "RUNNING" and len(found) < self.wanted else status
        return "TERMINATED" if self.kind == "pod" else "PROVISIONING"

    @property
    def dollars_per_hour(self) -> float:
        return sum(pod.cost for pod in self.pods)

    @property
    def origin(self) -> str:
        """Of whoever has started it, by the mark in its environment; empty where it has none."""
        return next((mark for pod in self.pods if (mark := pod.env.get(ORIGIN_VARIABLE))), "")

    @property
    def data_center(self) -> str:
        return next((pod.data_center_id for pod in self.pods if pod.data_center_id), "")


def of_pod(pod: Pod) -> Machine:
    return Machine("pod", pod.id, pod.name, (pod,), 1, pod.created_at.timestamp())


def of_cluster(api: Api, cluster: Cluster) -> Machine:
    try:
        pods = tuple(api.cluster_pods(cluster.id))
    except Refused as refused:
        if refused.status != 404:
            raise
        pods = ()
    return new_cluster(cluster, pods)


def new_cluster(cluster: Cluster, pods: tuple[Pod, ...] = ()) -> Machine:
    """One whose pods nobody has asked for yet."""
    created = cluster.created_at.timestamp()
    return Machine("cluster", cluster.id, cluster.name, pods, cluster.compute.pod_count, created)


def find_machine(api: Api, kind: Kind, machine_id: str) -> Machine | None:
    """None when it is gone; what is being deleted still counts."""
    if kind == "cluster":
        cluster = api.find_cluster(machine_id)
        return None if cluster is None else of_cluster(api, cluster)
    pod = api.find_pod(machine_id)
    return None if pod is None or pod.status == "TERMINATED" else of_pod(pod)


def is_gone(api: Api, kind: Kind, machine_id: str) -> bool:
    """Whether RunPod says so; no answer that can be read says nothing."""
    try:
        return find_machine(api, kind, machine_id) is None
    except (Lost, Refused):
        return False


def list_machines(api: Api) -> list[Machine]:
    """All that Trainway has ever started on this account and that is not gone."""
    pods = [of_pod(pod) for pod in api.list_pods() if _is_ours(pod.name) and pod.status != "TERMINATED"]
    clusters = [of_cluster(api, cluster) for cluster in api.list_clusters() if _is_ours(cluster.name)]
    return [*pods, *clusters]


def machines_of(api: Api, record: Record, kind: Kind) -> list[Machine]:
    """What is at RunPod under the job's own name, the oldest first: one at most, unless an answer was lost."""
    name = record.remote_name
    if kind == "cluster":
        found = [of_cluster(api, cluster) for cluster in api.list_clusters() if cluster.name == name]
    else:
        found = [of_pod(pod) for pod in api.list_pods() if pod.name == name and pod.status != "TERMINATED"]
    return sorted(found, key=lambda machine: machine.created)


def only_machine(api: Api, record: Record, kind: Kind, say: Say) -> Machine | None:
    """The job's machine; a second one that a lost answer has left behind is ended."""
    found = machines_of(api, record, kind)
    if not found:
        return None
    known = record.place.get("id")
    kept = next((machine for machine in found if machine.id == known), found[0])
    _end_others(api, found, kept.id, say)
    return kept


def end_others(api: Api, record: Record, kept: Machine, say: Say) -> None:
    """End whatever else is under the job's name: one whose answer was lost may show in the list late."""
    _end_others(api, machines_of(api, record, kept.kind), kept.id, say)


def _end_others(api: Api, found: Sequence[Machine], kept_id: str, say: Say) -> None:
    for machine in found:
        if machine.id != kept_id:
            say(f"{machine.kind} {machine.id} is a second one of this job: ended")
            end_machine(api, machine.kind, machine.id)


def wait_until_running(
    api: Api,
    machine: Machine,
    say: Say,
    deadline: Deadline,
    check: Callable[[Machine], str],
    final: Sequence[PodStatus] = ("ERROR", "EXITED", "TERMINATED"),
) -> Machine | str:
    """The machine once all its pods run, or why it will not do.

    check: what is wrong with it as it is now, or nothing; final: where it does not come back from by itself.
    A network that fails meanwhile is waited for too: the machine is noted, and starts without us.
    """
    shown = ""
    while True:
        if wrong := check(machine):
            return wrong
        status = machine.status
        if status != shown:
            say(f"{machine.kind} {machine.id}: {status}")
            shown = status
        if status == "RUNNING":
            return machine
        if status in final:
            return f"{machine.kind} {machine.id} went to {status}"
        if deadline.is_over():
            return f"{machine.kind} {machine.id} was still {status} after {deadline}"
        deadline.tell(f"{machine.kind} {machine.id}: {status}")
        api.clock.sleep(POLL_S)
        try:
            found = find_machine(api, machine.kind, machine.id)
        except Lost as lost:
            if deadline.is_over():
                raise
            say(f"{lost.what}: {lost.why}; asked again")
            continue
        if found is None:
            return f"{machine.kind} {machine.id} is gone"
        machine = found


def end_machine(api: Api, kind: Kind, machine_id: str) -> None:
    """Terminate a machine, and come back only when RunPod says that it is gone.

    Raises EnvironmentFault when it does not say so, however often it is asked: the machine may bill on.
    """
    why = "it is still there"
    for attempt in range(1, END_ATTEMPTS + 1):
        # asked for before anything is looked at: an answer that cannot be read must not keep it alive
        refused = _delete(api, kind, machine_id)
        try:
            if find_machine(api, kind, machine_id) is None:
                return
            why = refused or "it is still there"
        except (Refused, Lost) as fault:
            why = refused or fault.why
            if isinstance(fault, Refused) and fault.status in (401, 402, 403):
                break
        api.clock.sleep(api.clock.backoff(attempt))
    raise EnvironmentFault(
        f"{kind} {machine_id} is not known to have ended, and may go on costing money",
        why,
        "start the same command again, or end it at console.runpod.io",
    )


def _delete(api: Api, kind: Kind, machine_id: str) -> str:
    """Why it was not deleted; empty when it was, or was not there."""
    try:
        api.delete_cluster(machine_id) if kind == "cluster" else api.delete_pod(machine_id)
    except Refused as refused:
        return "" if refused.status == 404 else refused.why
    except Lost as lost:
        return lost.why
    return ""


def _is_ours(name: str) -> bool:
    return _OUR_NAME.fullmatch(name) is not None
