"""The way from nothing to running pods: each step finds what an earlier try has made."""

from __future__ import annotations

import re
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
from trainway.jobs.waiting import Deadline

POLL_S = 2.0
ENDED = ("Succeeded", "Failed")
HOPELESS = ("InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError")
"""Reasons that no waiting cures."""
REFUSED = re.compile(
    r"violates PodSecurity|must specify (limits|requests)|unable to validate against any security"
)
"""Words of a cluster that makes no such pod, however long it is waited."""

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


def bring_files(
    cluster: Cluster, pod: Object, job: Job, token: str, say: Say, wait: Wait, deadline: Deadline
) -> None:
    """Upload through a pod of its own, which is gone afterwards: the claim may be one node's alone."""
    upload.planned_files(job.spec, Path(job.folder))  # a path that is not here is told before there is a pod
    name = pod["metadata"]["name"]
    _clear(cluster, "Pod", name, wait, lambda found: found.get("status", {}).get("phase") in ENDED)
    create(cluster, pod, token, say)
    watched = Watched(cluster, token, "upload", name, say, wait, deadline)
    for pods in watched.pods():
        if any(is_running(found) for found in pods):
            break
        if watched.is_over():
            cluster.delete("Pod", name)
            raise deadline.fault(f"pod {name}", watched.words(), "it is ended; correct that, then try again")
        if any(found.get("status", {}).get("phase") in ENDED for found in pods):
            raise EnvironmentFault(
                f"the pod {name} ended early", trouble(pods[0]), "see its reason, then try again"
            )
    upload.bring_files(cluster, name, job, say)
    _clear(cluster, "Pod", name, wait, lambda _: True)


def prepare_data(
    cluster: Cluster, manifest: Object, token: str, say: Say, wait: Wait, deadline: Deadline
) -> None:
    """Tokenise in a Job of its own, and wait for it: the training's GPUs are not asked for before.

    Raises DataError when it fails, EnvironmentFault when none of its pods comes in time.
    """
    name = manifest["metadata"]["name"]
    _clear(cluster, "Job", name, wait, lambda found: is_finished(found) and not is_complete(found))
    create(cluster, manifest, token, say)
    watched = Watched(cluster, token, "prepare", name, say, wait, deadline)
    for pods in watched.pods():
        found = cluster.read("Job", name)
        if any(is_running(pod) for pod in pods):
            deadline.renew()
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
        if watched.is_over():
            raise deadline.fault(f"Job {name}", watched.words(), _left(job_name_of(manifest)))


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
    if (note := _differs(made, manifest)) and not is_complete(made):
        say(note)
    wanted = {key: manifest["spec"][key] for key in ("suspend", "replicas") if key in manifest["spec"]}
    if is_complete(made) or wanted.get("suspend"):  # a queue decides
        return made
    if any(made.get("spec", {}).get(key) != value for key, value in wanted.items()):
        say(f"resumed: {kind} {name}")
        return cluster.patch(kind, name, {"spec": wanted})
    return made


def wait_until_running(
    cluster: Cluster, workload: Object, token: str, nodes: int, say: Say, wait: Wait, deadline: Deadline
) -> None:
    """Tell what the pods wait for until all run, or the job has ended.

    Raises EnvironmentFault for what no waiting cures, when the job fails, and when the pods do not come in time: they
    are left then, since the cluster or its queue may still start them.
    """
    kind, name = workload["kind"], workload["metadata"]["name"]
    watched = Watched(cluster, token, "train", name, say, wait, deadline)
    for pods in watched.pods():
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
        if watched.is_over():
            raise deadline.fault(
                f"{kind} {name}",
                "; ".join(dict.fromkeys([status.detail, watched.words()])),
                _left(job_name_of(workload)),
            )


class Watched:
    """The pods of one step of a job, and what the cluster says of them and of what is to make them; told once each.

    name: of the Job, JobSet, StatefulSet or Pod, with which the names of all that it makes begin.
    """

    def __init__(
        self, cluster: Cluster, token: str, role: str, name: str, say: Say, wait: Wait, deadline: Deadline
    ) -> None:
        self._cluster, self._name, self._say, self._wait, self._deadline = cluster, name, say, wait, deadline
        self._labels = f"{selector(token)},trainway/role={role}"
        self._told: set[str] = set()
        self._last: list[str] = []
        self._old = {_event_id(event) for event in self._warnings()}
        """What was said before this: of an earlier try."""

    def pods(self) -> Iterator[list[Object]]:
        """The newest pods again and again. Raises EnvironmentFault when the cluster refuses to make any."""
        while True:
            pods = latest_pods(self._cluster.list("Pod", self._labels))
            reasons = [f"{pod['metadata']['name']}: {why}" for pod in pods if (why := trouble(pod))]
            self._tell("waiting", reasons)
            events = [event for event in self._warnings() if _event_id(event) not in self._old or pods]
            lines = [event_line(event) for event in events]
            self._tell("event", lines)
            self._last = [*reasons, *lines[-3:]] or self._last
            refused = next((line for line in lines if not pods and REFUSED.search(line)), "")
            if refused:
                raise EnvironmentFault(
                    f"the cluster makes no pod of {self._name}",
                    refused,
                    "ask for a namespace that allows it, or change the settings of kubernetes (docs/kubernetes.md), then "
                    "run the same command again",
                )
            yield pods
            self._deadline.tell(f"{self._name}: {self.words()}")
            self._wait(POLL_S)

    def is_over(self) -> bool:
        return self._deadline.is_over()

    def words(self) -> str:
        """What the cluster said last."""
        return "; ".join(self._last) or "the cluster says nothing of it"

    def _tell(self, kind: str, lines: list[str]) -> None:
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                self._say(f"{kind}: {line}")

    def _warnings(self) -> list[Object]:
        """A quota or a policy that refuses the pods is told of their Job, and Kueue's Workload has its name within its own."""
        try:
            events = self._cluster.list("Event", fields="type=Warning")
        except EnvironmentFault:  # not everybody may read events
            return []
        return [
            event
            for event in events
            if event.get("type") == "Warning"
            and self._name in str(event.get("involvedObject", {}).get("name", ""))
        ]


def _event_id(event: Object) -> tuple[object, object]:
    return event["metadata"].get("uid") or event["metadata"].get("name"), event.get("count")


def job_name_of(manifest: Object) -> str:
    return str(manifest["metadata"]["labels"][JOB])


def _left(name: str) -> str:
    return (
        f"it is left, and may still start: `trainway status {name}`; the same command waits again, "
        f"`trainway down {name}` takes it away"
    )


def _differs(found: Object, manifest: Object) -> str:
    """What a workload that is there was made with, where the job file says something else now: it is not changed."""
    differing = [
        f"{key} {there}"
        for key in ("image", "resources")
        if (there := _first_container(found).get(key)) != _first_container(manifest).get(key)
    ]
    if not differing:
        return ""
    name = job_name_of(manifest)
    return f"note: it goes on as it was made, with {', '.join(differing)}; for the job file's: `trainway down {name}`, then up"


def _first_container(workload: Object) -> Object:
    spec = workload.get("spec", {})
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"].get("spec", {})
    containers = spec.get("template", {}).get("spec", {}).get("containers") or [{}]
    return dict(containers[0])


def refuse_second_user(cluster: Cluster, job: str, token: str, kinds: tuple[str, ...]) -> None:
    """Raise ConfigError when an unfinished job of another token has this one's name: both would write to one claim."""
    for kind in kinds:
        for found in cluster.list(kind, f"{JOB}={job}"):
            if found["metadata"]["labels"].get(TOKEN) != token and not is_finished(found):
                raise ConfigError(
                    f"another job called {job} is in the namespace: {kind} {found['metadata']['name']}",
                    f"both would write to the claim trainway-{job}",
                    "call this one otherwise, or name another claim as volume.id",
                )


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
