"""The way from nothing to running pods: each step finds what an earlier try has made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs.kubernetes import upload
from trainway.jobs.kubernetes.cluster import Cluster, Exists, NotFound, Object
from trainway.jobs.kubernetes.names import JOB, TOKEN, selector
from trainway.jobs.kubernetes.states import (
    conditions,
    event_line,
    is_complete,
    is_finished,
    is_running,
    job_status,
    latest_pods,
    pod_line,
    trouble,
)
from trainway.jobs.target import Job, Say

POLL_S = 2.0
ENDED = ("Succeeded", "Failed")
HOPELESS = ("InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError")
"""Reasons that no waiting cures."""

Wait = Callable[[float], object]


def create(cluster: Cluster, manifest: Object, token: str, say: Say) -> Object:
    """Create the object, or find it made by an earlier try; its contents become those of `manifest` where it has any.

    Raises ConfigError when another's object has its name.
    """
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    try:
        made = cluster.create(manifest)
    except Exists:
        found = cluster.read(kind, name)
        _refuse_foreign(found, manifest, token)
        if kind == "ConfigMap" and found.get("data") != manifest["data"]:
            say(f"changed: {kind} {name}; pods that start from now on read it")
            return cluster.patch(kind, name, {"data": manifest["data"]})
        return found
    except NotFound as error:
        raise _missing(kind, cluster.namespace, str(error)) from error
    say(f"created: {kind} {name}")
    return made


def bring_files(cluster: Cluster, pod: Object, job: Job, token: str, say: Say, wait: Wait) -> None:
    """Upload through a pod of its own, which is gone afterwards: the claim may be one node's alone."""
    upload.planned_files(job.spec, Path(job.folder))  # a path that is not here is told before there is a pod
    name = pod["metadata"]["name"]
    _clear(cluster, "Pod", name, wait, lambda found: found.get("status", {}).get("phase") in ENDED)
    create(cluster, pod, token, say)
    for pods in _watch(cluster, token, "upload", say, wait):
        if any(is_running(found) for found in pods):
            break
        if any(found.get("status", {}).get("phase") in ENDED for found in pods):
            raise EnvironmentFault(
                f"the pod {name} ended early", trouble(pods[0]), "see its reason, then try again"
            )
    upload.bring_files(cluster, name, job, say)
    _clear(cluster, "Pod", name, wait, lambda _: True)


def prepare_data(cluster: Cluster, manifest: Object, token: str, say: Say, wait: Wait) -> None:
    """Tokenise in a Job of its own, and wait for it: the training's GPUs are not asked for before.

    Raises DataError when it fails.
    """
    name = manifest["metadata"]["name"]
    _clear(cluster, "Job", name, wait, lambda found: is_finished(found) and not is_complete(found))
    create(cluster, manifest, token, say)
    for _ in _watch(cluster, token, "prepare", say, wait):
        found = cluster.read("Job", name)
        if is_complete(found):
            say(f"tokenised: {name}")
            return
        if is_finished(found):
            pods = latest_pods(cluster.list("Pod", selector(token, "prepare")))
            why = "; ".join(line for pod in pods if (line := trouble(pod)))
            failed = conditions(found)["Failed"]
            raise DataError(
                f"the preparation {name} failed",
                why or f"{failed.get('reason')}: {failed.get('message')}",
                "see `trainway logs`, correct the data, then run the same command again: finished parts are kept",
            )


def start(cluster: Cluster, manifest: Object, token: str, say: Say, wait: Wait) -> Object:
    """Create the workload, or let the one that is there go on; one that has failed is replaced.

    A finished run is left alone. Raises ConfigError when another's object has its name.
    """
    kind, name = manifest["kind"], manifest["metadata"]["name"]

    def is_over(found: Object) -> bool:
        failed = is_finished(found) and not is_complete(found)
        return failed or bool(found["metadata"].get("deletionTimestamp"))

    found = cluster.find(kind, name)
    if found is not None:
        _refuse_foreign(found, manifest, token)
    _clear(cluster, kind, name, wait, is_over)
    made = create(cluster, manifest, token, say)
    wanted = {key: manifest["spec"][key] for key in ("suspend", "replicas") if key in manifest["spec"]}
    if is_complete(made) or wanted.get("suspend"):  # a queue decides
        return made
    if any(made.get("spec", {}).get(key) != value for key, value in wanted.items()):
        say(f"resumed: {kind} {name}")
        return cluster.patch(kind, name, {"spec": wanted})
    return made


def wait_until_running(
    cluster: Cluster, workload: Object, token: str, nodes: int, say: Say, wait: Wait
) -> None:
    """Tell what the pods wait for until all run, or the job has ended.

    Raises EnvironmentFault for what no waiting cures, and when the job fails.
    """
    kind, name = workload["kind"], workload["metadata"]["name"]
    for pods in _watch(cluster, token, "train", say, wait):
        found = cluster.find(kind, name)
        status = job_status(kind, found, pods, nodes)
        if status.machine == "running":
            say(f"running: {status.detail}")
            return
        if found is None or status.machine == "gone":
            say(status.detail)
            return
        hopeless = next((pod for pod in pods if _reason(pod) in HOPELESS), None)
        if status.machine == "failed" or hopeless is not None:
            raise EnvironmentFault(
                f"{kind} {name} does not run",
                pod_line(hopeless) if hopeless else "; ".join([status.detail, *status.nodes]),
                "see `trainway logs`; correct it and run the same command again, or `trainway down`",
            )


def _watch(cluster: Cluster, token: str, role: str, say: Say, wait: Wait) -> Iterator[list[Object]]:
    """The newest pods of this role again and again; what the cluster says of them is told once."""
    told: set[str] = set()
    while True:
        pods = latest_pods(cluster.list("Pod", f"{selector(token)},trainway/role={role}"))
        for pod in pods:
            if (why := trouble(pod)) and (line := f"{pod['metadata']['name']}: {why}") not in told:
                told.add(line)
                say(f"waiting: {line}")
        for event in _warnings(cluster, {pod["metadata"]["name"] for pod in pods}):
            if (line := event_line(event)) not in told:
                told.add(line)
                say(f"event: {line}")
        yield pods
        wait(POLL_S)


def _warnings(cluster: Cluster, names: set[str]) -> list[Object]:
    if not names:
        return []
    try:
        events = cluster.list("Event", fields="type=Warning")
    except EnvironmentFault:  # not everybody may read events
        return []
    recent = [event for event in events if event.get("involvedObject", {}).get("name") in names]
    return [event for event in recent if event.get("type") == "Warning"]


def _reason(pod: Object) -> str:
    return trouble(pod).partition(":")[0]


def _clear(cluster: Cluster, kind: str, name: str, wait: Wait, unwanted: Callable[[Object], bool]) -> None:
    """Delete the object when it is unwanted, and wait until it is gone."""
    found = cluster.find(kind, name)
    if found is None or not unwanted(found):
        return
    cluster.delete(kind, name)
    while cluster.find(kind, name) is not None:
        wait(POLL_S)


def _refuse_foreign(found: Object, manifest: Object, token: str) -> None:
    labels = found["metadata"].get("labels") or {}
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    key, expected = (
        (JOB, manifest["metadata"]["labels"][JOB]) if kind == "PersistentVolumeClaim" else (TOKEN, token)
    )
    if labels.get(key) != expected:
        raise ConfigError(
            f"there is another {kind} {name} in the namespace",
            "it was not made for this job",
            "name it as volume.id to use it" if kind == "PersistentVolumeClaim" else "call the job otherwise",
        )


def _missing(kind: str, namespace: str, said: str) -> EnvironmentFault:
    if kind == "JobSet":
        return EnvironmentFault(
            "the cluster knows no JobSet", said, "install JobSet (https://jobset.sigs.k8s.io), or use `kind: job`"
        )  # fmt: skip
    return EnvironmentFault(
        f"there is no namespace {namespace}", said, f"run: kubectl create namespace {namespace}"
    )
