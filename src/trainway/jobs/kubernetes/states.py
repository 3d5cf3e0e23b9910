"""What the cluster says of a job, in words: its pods, why they wait, how they ended; without asking anything."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from trainway.errors import ExitCode
from trainway.jobs.kubernetes.cluster import Object
from trainway.jobs.kubernetes.names import CONTAINER, INDEX, POD_INDEX
from trainway.jobs.target import JobStatus, MachineState

MEANINGS = {
    ExitCode.CONFIG: "the configuration is wrong",
    ExitCode.DATA: "the data is wrong",
    ExitCode.ENVIRONMENT: "the machine lacks something",
    ExitCode.STOPPED: "stopped with a checkpoint saved",
    137: "killed",
    143: "ended before it could save",
}


def job_status(kind: str, workload: Object | None, pods: list[Object], nodes: int) -> JobStatus:
    """The machine's part of a job's status; the pod's own word is not in it."""
    latest = latest_pods(pods)
    lines = tuple(pod_line(pod) for pod in latest)
    if workload is None:
        return JobStatus("gone", f"there is no such {kind}", nodes=lines)
    state, detail = _workload_state(kind, workload)
    if state is None:
        state, detail = _pods_state(latest, nodes)
    shown = lines if len(lines) > 1 or state == "failed" else ()
    return JobStatus(state, detail, nodes=shown)


def _workload_state(kind: str, workload: Object) -> tuple[MachineState | None, str]:
    """What the Job or JobSet itself knows; None when its pods have to be asked."""
    if workload["metadata"].get("deletionTimestamp"):
        return "stopped", "it is being deleted; its pods have their grace time to save"
    spec, held = workload.get("spec", {}), conditions(workload)
    for name in ("Complete", "Completed"):
        if name in held:
            return "gone", "complete: every node has ended well"
    for name in ("Failed", "FailureTarget"):
        if name in held:
            return "failed", ": ".join(filter(None, (held[name].get("reason"), held[name].get("message"))))
    if kind == "StatefulSet":
        return ("stopped", "no replicas: `trainway up` goes on") if spec.get("replicas") == 0 else (None, "")
    if spec.get("suspend"):
        if any(name.startswith("kueue.x-k8s.io/") for name in workload["metadata"].get("labels") or {}):
            return "starting", "waiting in its queue"
        return "stopped", "suspended: `trainway up` goes on"
    return None, ""


def _pods_state(pods: list[Object], nodes: int) -> tuple[MachineState, str]:
    running = [pod for pod in pods if is_running(pod)]
    if len(running) >= nodes:
        return "running", f"{len(running)} of {nodes} running"
    reasons = [reason for pod in pods if (reason := trouble(pod))]
    detail = f"{len(running)} of {nodes} running"
    return "starting", "; ".join([detail, *dict.fromkeys(reasons)])


def conditions(item: Object) -> dict[str, Object]:
    """The conditions that are true, by their type."""
    held = item.get("status", {}).get("conditions") or []
    return {one["type"]: one for one in held if one.get("status") == "True"}


def is_finished(workload: Object) -> bool:
    """Whether a Job or JobSet has ended, well or not."""
    return bool(conditions(workload).keys() & {"Complete", "Completed", "Failed"})


def is_complete(workload: Object) -> bool:
    return bool(conditions(workload).keys() & {"Complete", "Completed"})


def pod_index(pod: Object) -> int:
    """The number of the pod's node."""
    labels = pod["metadata"].get("labels") or {}
    text = labels.get(INDEX) or labels.get(POD_INDEX) or ""
    if not text:
        text = pod["metadata"]["name"].rpartition("-")[2]  # of a StatefulSet
    return int(text) if text.isdecimal() else 0


def latest_pods(pods: Iterable[Object]) -> list[Object]:
    """The newest pod of each node, by node."""
    newest: dict[int, Object] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"].get("creationTimestamp") or ""):
        newest[pod_index(pod)] = pod
    return [newest[index] for index in sorted(newest)]


def container_status(pod: Object) -> Object:
    """What is known of the pod's only container."""
    held = pod.get("status", {}).get("containerStatuses") or []
    return next((one for one in held if one.get("name") == CONTAINER), {})


def is_running(pod: Object) -> bool:
    state = container_status(pod).get("state") or {}
    return "running" in state and not pod["metadata"].get("deletionTimestamp")


def has_ended(pod: Object) -> bool:
    """Whether the pod will print nothing more."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def trouble(pod: Object) -> str:
    """Why the pod does not run, in the cluster's words; empty when nothing is wrong."""
    held = container_status(pod)
    state = held.get("state") or {}
    if waiting := state.get("waiting"):
        words = [waiting.get("reason"), waiting.get("message")]
        if last := (held.get("lastState") or {}).get("terminated"):
            words.append(f"before that {ending(last)}")
        return ": ".join(word for word in words if word)
    if ended := state.get("terminated"):
        return ending(ended) if ended.get("exitCode") else ""
    for one in pod.get("status", {}).get("conditions") or []:
        if one.get("type") == "PodScheduled" and one.get("status") == "False":
            return ": ".join(filter(None, (one.get("reason"), one.get("message"))))
    reason, message = pod.get("status", {}).get("reason"), pod.get("status", {}).get("message")
    return ": ".join(filter(None, (reason, message)))


def ending(terminated: Mapping[str, Any]) -> str:
    """How a container ended: `exit code 137 (OOMKilled)`, and what it said last."""
    code = terminated.get("exitCode")
    reason = terminated.get("reason") or ""
    if reason in ("", "Error", "Completed"):
        reason = MEANINGS.get(code, "") if isinstance(code, int) else ""
    text = f"exit code {code}" + (f" ({reason})" if reason else "")
    said = (terminated.get("message") or "").strip().splitlines()
    return f"{text}: {said[-1]}" if said and code else text


def pod_line(pod: Object) -> str:
    """One line for the user: the node's number, where it is, how it does."""
    where = pod.get("spec", {}).get("nodeName")
    phase = pod.get("status", {}).get("phase", "Unknown")
    if pod["metadata"].get("deletionTimestamp"):
        phase = "Terminating"
    restarts = container_status(pod).get("restartCount")
    parts = [f"node {pod_index(pod)}: {phase}", *([f"on {where}"] if where else [])]
    parts += [f"{restarts} restarts"] if restarts else []
    why = trouble(pod)
    return ", ".join(parts) + (f": {why}" if why else "")


def event_line(event: Object) -> str:
    """`Insufficient nvidia.com/gpu` and the like, behind what it is about."""
    about = event.get("involvedObject", {}).get("name", "")
    return f"{about}: {event.get('reason', '')}: {' '.join(str(event.get('message', '')).split())}"


def timestamp(text: str | None) -> float | None:
    """Seconds since 1970 of a time as Kubernetes writes it."""
    if not text:
        return None
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
