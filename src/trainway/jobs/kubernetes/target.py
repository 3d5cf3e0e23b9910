"""Jobs on Kubernetes: the verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.jobs.kubernetes.cluster import Cluster, Object, connect
from trainway.jobs.kubernetes.creating import (
    bring_files,
    create,
    prepare_data,
    refuse_second_user,
    start,
    wait_until_running,
)
from trainway.jobs.kubernetes.logs import job_log
from trainway.jobs.kubernetes.manifests import SPARE_S, Manifests, build, check, claim_name
from trainway.jobs.kubernetes.names import MANAGED_BY, ORIGIN, PRICE, TOKEN, Names, selector
from trainway.jobs.kubernetes.shell import output, terminal, tunnel
from trainway.jobs.kubernetes.states import (
    conditions,
    is_complete,
    is_finished,
    is_running,
    job_status,
    latest_pods,
    timestamp,
)
from trainway.jobs.orders import JobDir, PodState
from trainway.jobs.origin import known_origin, origin
from trainway.jobs.record import Record
from trainway.jobs.target import Cost, Job, JobStatus, Say, Stray
from trainway.jobs.waiting import Deadline

WORKLOADS = {"job": "Job", "jobset": "JobSet", "statefulset": "StatefulSet"}
POLL_S = 2.0
SAY_EVERY_S = 60.0

Connect = Callable[[str | None, str], Cluster]


class KubernetesTarget:
    """Jobs on a Kubernetes cluster that the kubeconfig leads to.

    connect, wait, now: how the cluster is reached, time is let pass, and told in seconds.
    """

    def __init__(
        self,
        connect: Connect = connect,
        wait: Callable[[float], object] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._wait = wait
        self._now = now

    def request(self, job: Job, record: Record) -> list[Object]:
        """The manifests in the order of their creation."""
        return build(job, record).all()

    def up(self, job: Job, record: Record, say: Say) -> Record:
        """Create what is missing, bring the files, tokenise, start the training, and tell why it waits."""
        check(job)
        origin()
        manifests = build(job, record)
        kube = job.spec.kubernetes
        cluster = self._connect(kube.context, kube.namespace)
        record = record.with_(root=job.orders.root, place=_place(job, record))
        for note in manifests.notes:
            say(f"note: {note}")
        if manifests.claim is not None:
            refuse_second_user(cluster, record.name, record.token, ("Job", WORKLOADS[kube.kind]))
        self._create(cluster, manifests, record, job, say)
        workload = start(cluster, manifests.workload, record.token, say, self._wait)
        record = record.with_(phase="up", ended=None)
        deadline = self._deadline(job, say)
        wait_until_running(cluster, workload, record.token, job.spec.nodes, say, self._wait, deadline)
        return record

    def _deadline(self, job: Job, say: Say) -> Deadline:
        return Deadline(job.orders.limits.start_minutes, say, now=self._now)

    def _create(self, cluster: Cluster, manifests: Manifests, record: Record, job: Job, say: Say) -> None:
        for manifest in (manifests.claim, manifests.settings, manifests.service):
            if manifest is not None:
                create(cluster, manifest, record.token, say)
        found = cluster.find(record.place["kind"], record.place["name"])
        if found is not None and (is_complete(found) or not is_finished(found)):
            return  # its files and its data were there before it, and its pods may hold the volume
        if manifests.upload is not None:
            deadline = self._deadline(job, say)
            bring_files(cluster, manifests.upload, job, record.token, say, self._wait, deadline)
        if manifests.prepare is not None:
            deadline = self._deadline(job, say)
            prepare_data(cluster, manifests.prepare, record.token, say, self._wait, deadline)

    def status(self, record: Record) -> JobStatus:
        cluster, kind, name = self._find(record)
        pods = cluster.list("Pod", selector(record.token, "train"))
        workload = cluster.find(kind, name)
        found = job_status(kind, workload, pods, record.place["nodes"])
        if workload is None and record.phase == "stopped":
            return JobStatus("stopped", "taken out of its queue: `trainway up` goes on")
        if workload is None and record.phase == "asked" and record.place["prepare"]:
            found = self._preparing(cluster, record) or found
        first = next((pod for pod in latest_pods(pods) if is_running(pod)), None)
        if first is None:
            return found
        return JobStatus(found.machine, found.detail, _inside(cluster, record, first), found.nodes)

    def _preparing(self, cluster: Cluster, record: Record) -> JobStatus | None:
        """While the data is tokenised there is no training yet."""
        prepare = cluster.find("Job", record.place["prepare"])
        if prepare is None:
            return None
        pods = cluster.list("Pod", selector(record.token, "prepare"))
        found = job_status("Job", prepare, pods, prepare["spec"].get("completions", 1))
        state = "starting" if found.machine in ("running", "gone") else found.machine
        return JobStatus(state, f"tokenising: {found.detail}", nodes=found.nodes)

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        cluster, kind, name = self._find(record)

        def is_over() -> bool:
            workload = cluster.find(kind, name)
            return workload is None or is_finished(workload)

        yield from job_log(
            cluster,
            record.token,
            nodes=record.place["nodes"],
            follow=follow,
            tail=tail,
            is_over=is_over,
            wait=self._wait,
        )

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        """A shell, or one command, in the pod of node 0."""
        cluster, _, _ = self._find(record)
        return terminal(cluster, self._first_pod(cluster, record), command)

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        cluster, _, _ = self._find(record)
        return tunnel(cluster, self._first_pod(cluster, record), ports, say)

    def stop(self, record: Record, say: Say) -> Record:
        """Suspend the job, or take it out of its queue: its pods save within their grace time and are gone."""
        cluster, kind, name = self._find(record)
        found = cluster.find(kind, name)
        hours = _hours(record, found)
        if found is None and record.place["prepare"] and cluster.delete("Job", record.place["prepare"]):
            self._wait_for_pods_to_go(cluster, record, say)
            say("stopped: the parts that are tokenised are kept")
            return record.with_(phase="stopped")
        if found is None or is_finished(found):
            raise ConfigError(
                f"{record.name} does not run", f"its {kind} has ended or is gone", "see `trainway status`"
            )
        if record.place.get("queued"):
            # the queue would start a suspended job again
            cluster.delete(kind, name)
        elif kind == "StatefulSet":
            cluster.patch(kind, name, {"spec": {"replicas": 0}})
        else:
            cluster.patch(kind, name, {"spec": {"suspend": True}})
        self._wait_for_pods_to_go(cluster, record, say)
        say(f"stopped: `trainway up` goes on from the last checkpoint; {_kept(record)}")
        return record.with_(phase="stopped", place={**record.place, "hours": hours})

    def down(self, record: Record, say: Say) -> Record:
        """Delete all but the volume, and see that it is gone."""
        if not record.place:
            return record.with_(phase="ended", ended=time.time())
        cluster, kind, name = self._find(record)
        hours = _hours(record, cluster.find(kind, name))
        cluster.delete(kind, name)
        names = Names.of(record)
        for other, called in (("Job", names.prepare), ("Pod", names.upload), ("Service", names.base)):
            cluster.delete(other, called)
        cluster.delete("ConfigMap", names.settings)
        self._wait_for_pods_to_go(cluster, record, say)
        self._wait_for_all_to_go(cluster, kind, record, say)
        say(f"gone: {kind} {name}; {_kept(record)}")
        return record.with_(phase="ended", ended=time.time(), place={**record.place, "hours": hours})

    def cost(self, record: Record) -> Cost:
        """By the clock, from each start to its end, the waiting for room included: Kubernetes sends no bill."""
        hours = float(record.place.get("hours", 0.0))
        if record.place and record.phase != "ended":
            cluster, kind, name = self._find(record)
            hours = _hours(record, cluster.find(kind, name))
        note = "" if record.dollars_per_hour else "no price is known: set `price` of the GPU in the job file"
        return Cost(hours, hours * record.dollars_per_hour, None, note)

    def strays(self, records: Sequence[Record]) -> list[Stray]:
        """Workloads that this machine's Trainway has made, in the namespaces of its jobs and wherever else it may look."""
        ours = {record.token: record for record in records if record.target == "kubernetes"}
        places = [record.place for record in ours.values() if record.place]
        found: dict[str, Stray] = {}
        for context in sorted({place["context"] for place in places} or {None}, key=str):
            spaces = {place["namespace"] for place in places if place["context"] == context}
            for kind, item in _workloads(self._connect(context, "default"), spaces):
                token = item["metadata"]["labels"].get(TOKEN, "")
                if why := _needless(item, ours.get(token)):
                    stray = _stray(context, kind, item, why)
                    found[stray.id] = stray
        return list(found.values())

    def end_stray(self, stray: Stray) -> None:
        context, namespace, kind, name = stray.id.split("|")
        self._connect(context or None, namespace).delete(kind, name)

    def _find(self, record: Record) -> tuple[Cluster, str, str]:
        """The job's cluster, and its workload's kind and name."""
        place = record.place
        if not place:
            raise ConfigError(
                f"{record.name} was never sent to a cluster", "nothing of it is there", "run: trainway up JOB.yaml"
            )  # fmt: skip
        return self._connect(place["context"], place["namespace"]), place["kind"], place["name"]

    def _first_pod(self, cluster: Cluster, record: Record) -> str:
        pods = latest_pods(cluster.list("Pod", selector(record.token, "train")))
        if not pods or not is_running(pods[0]):
            raise EnvironmentFault(
                f"node 0 of {record.name} does not run",
                "there is nothing to get into",
                "see `trainway status`",
            )
        return str(pods[0]["metadata"]["name"])

    def _wait_for_all_to_go(self, cluster: Cluster, kind: str, record: Record, say: Say) -> None:
        """What was asked to be deleted is gone when the cluster says so: somebody's finalizer may hold it."""
        told = self._now()
        while left := [
            f"{one} {item['metadata']['name']}"
            for one in dict.fromkeys((kind, "Job", "Pod", "Service", "ConfigMap"))
            for item in cluster.list(one, selector(record.token))
        ]:
            if self._now() - told > SAY_EVERY_S:
                say(f"waiting for {', '.join(left)} to be gone")
                told = self._now()
            self._wait(POLL_S)

    def _wait_for_pods_to_go(self, cluster: Cluster, record: Record, say: Say) -> None:
        told = 0.0
        while active := [
            pod
            for pod in cluster.list("Pod", selector(record.token))
            if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        ]:
            if time.monotonic() - told > SAY_EVERY_S:
                say(f"waiting for {len(active)} pods to save and end")
                told = time.monotonic()
            self._wait(POLL_S)


def _place(job: Job, record: Record) -> dict[str, Any]:
    kube, names = job.spec.kubernetes, Names.of(record)
    return {
        "context": kube.context,
        "namespace": kube.namespace,
        "kind": WORKLOADS[kube.kind],
        "name": names.base,
        "nodes": job.spec.nodes,
        "claim": claim_name(job, names),
        "queued": kube.queue is not None,
        "prepare": names.prepare if kube.prepare_workers > 1 else None,
        "hours": record.place.get("hours", 0.0),  # before the last stop
        "since": record.place["since"] if record.phase == "up" else time.time(),
    }


def _hours(record: Record, workload: Object | None) -> float:
    """Hours that the job has had its machines, those before the last stop included.

    A Job's own startTime begins anew with each `up`; of a JobSet there is only its creation.
    """
    before = float(record.place.get("hours", 0.0))
    if workload is None or _state(workload) == "suspended":
        return before
    status = workload.get("status", {})
    began = timestamp(status.get("startTime") or workload["metadata"].get("creationTimestamp"))
    last = next(iter(conditions(workload).values()), {}) if is_finished(workload) else {}
    ended = timestamp(status.get("completionTime") or last.get("lastTransitionTime")) or time.time()
    return before + max(0.0, ended - max(began or 0.0, float(record.place["since"]))) / 3600


def _inside(cluster: Cluster, record: Record, pod: Object) -> PodState | None:
    """What the job says of itself; None when it cannot be asked, or has not said anything."""
    path = JobDir.of(record.root, record.name).state
    try:
        code, text = output(cluster, pod["metadata"]["name"], ("cat", str(path)))
        return PodState.model_validate_json(text) if code == 0 else None
    except (UserError, ValueError):
        return None


def _workloads(cluster: Cluster, spaces: set[str]) -> Iterator[tuple[str, Object]]:
    """Everything of Trainway's that may hold a machine, with its kind; in `spaces` where more is forbidden."""
    for kind in (*WORKLOADS.values(), "Pod"):
        try:
            items = cluster.list(kind, f"{MANAGED_BY}=trainway", everywhere=True)
        except EnvironmentFault:
            if not spaces:
                raise
            items = []
            for space in sorted(spaces):
                items += Cluster(cluster.api, space).list(kind, f"{MANAGED_BY}=trainway")
        for item in items:
            if not item["metadata"].get("ownerReferences"):  # the others belong to a workload
                yield kind, item


def _needless(item: Object, record: Record | None) -> str:
    """Why no job needs this; empty when one does, or when it holds no machine."""
    if is_finished(item):
        return ""
    if record is None:
        # others have theirs in the same cluster
        ours = item["metadata"]["labels"].get(ORIGIN) == known_origin()
        return "no job of this machine is called so" if ours else ""
    if record.phase == "ended":
        return "its job has ended"
    began = timestamp(item.get("status", {}).get("startTime") or item["metadata"].get("creationTimestamp"))
    if record.limit_hours is None or began is None or _state(item) == "suspended":
        return ""
    late = time.time() - began - record.limit_hours * 3600 - SPARE_S
    return f"its deadline was {(late + SPARE_S) / 3600:.1f} hours ago" if late > 0 else ""


def _state(item: Object) -> str:
    spec = item.get("spec", {})
    if spec.get("suspend") or spec.get("replicas") == 0:
        return "suspended"
    return str(item.get("status", {}).get("phase", "active"))


def _stray(context: str | None, kind: str, item: Object, why: str) -> Stray:
    metadata = item["metadata"]
    return Stray(
        id="|".join((context or "", metadata.get("namespace", "default"), kind, metadata["name"])),
        name=metadata["name"],
        state=_state(item),
        dollars_per_hour=float((metadata.get("annotations") or {}).get(PRICE, 0.0)),
        why=why,
    )


def _kept(record: Record) -> str:
    claim = record.place.get("claim")
    if not claim:
        return "there was no volume"
    return f"the claim {claim} in {record.place['namespace']} stays, and its storage may cost"
