"""The objects of a job as data, in the order of their creation; nothing is sent, and no text is pasted together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import yaml

from trainway.errors import ConfigError, ExitCode
from trainway.jobs.kubernetes.names import (
    CONFIG_FILE,
    CONTAINER,
    ORDERS_FILE,
    PRICE,
    REPLICATED,
    Names,
    Role,
    secret_reference,
)
from trainway.jobs.kubernetes.pod import Manifest, pod_spec, pod_template
from trainway.jobs.record import Record
from trainway.jobs.spec import IMAGE
from trainway.jobs.target import Job

KEEP_FINISHED_S = 7 * 24 * 3600
"""A finished Job and its logs stay for a week: they hold no machine."""
SPARE_S = 3600
"""The machine ends itself at its deadline; the cluster does when it has not by then."""
NEVER_AGAIN = [int(code) for code in (ExitCode.CONFIG, ExitCode.DATA, ExitCode.ENVIRONMENT)]
"""Exit codes that another try would end with too."""
LARGEST_SETTINGS = 1_000_000
"""Bytes of a ConfigMap; etcd takes a little more."""
QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Manifests:
    """All that a job needs of a cluster."""

    claim: Manifest | None
    """The claim to make; None when there is one, or no volume."""
    settings: Manifest
    service: Manifest | None
    upload: Manifest | None
    """A pod that takes the files, gone before the next."""
    prepare: Manifest | None
    """Over before the next."""
    workload: Manifest
    notes: tuple[str, ...]
    """What the user should know of them."""

    def all(self) -> list[Manifest]:
        """In the order of their creation."""
        found = [self.claim, self.settings, self.service, self.upload, self.prepare, self.workload]
        return [manifest for manifest in found if manifest is not None]


def build(job: Job, record: Record) -> Manifests:
    """The manifests of a job. Raises ConfigError for what cannot run on a cluster as it is asked for."""
    check(job)
    names = Names.of(record)
    claim = claim_name(job, names)
    several = job.spec.kubernetes.prepare_workers > 1
    return Manifests(
        claim=_claim(job, names) if job.spec.volume.size_gb else None,
        settings=_settings(job, names),
        service=_service(job, names) if job.spec.kubernetes.kind != "jobset" else None,
        upload=_upload(job, names, claim) if job.spec.upload else None,
        prepare=_prepare(job, names, claim) if several else None,
        workload=_workload(job, names, claim),
        notes=tuple(_notes(job)),
    )


def claim_name(job: Job, names: Names) -> str | None:
    """The PersistentVolumeClaim of the job's root; None without a volume."""
    volume = job.spec.volume
    return volume.id or (names.claim if volume.size_gb else None)


def check(job: Job) -> None:
    """Raises ConfigError for what cannot run on a cluster as it is asked for."""
    spec, kube = job.spec, job.spec.kubernetes
    if spec.image == IMAGE:
        raise ConfigError(
            f"image is {spec.image}",
            "a pod runs without root on a file system that cannot be written: Trainway must be in the image",
            "build one (docs/kubernetes.md) and name it: `image: REGISTRY/trainway:TAG`",
        )
    if spec.source != ".":
        raise ConfigError(
            f"source is {spec.source}, and the target is kubernetes",
            "nothing is installed in a pod: Trainway is what its image holds",
            "take it out, and build the image from that source (docs/kubernetes.md)",
        )
    if spec.limits.save_minutes * 60 > kube.grace_s:
        raise ConfigError(
            f"limits.save_minutes is {spec.limits.save_minutes:g}, and kubernetes.grace_s is {kube.grace_s}",
            "the cluster would kill the pod while it saves",
            f"set kubernetes.grace_s to {seconds(spec.limits.save_minutes * 60) + 120}, or save_minutes lower",
        )
    for name, text in spec.secrets.items():
        if secret_reference(text) is None:
            raise ConfigError(
                f"secrets.{name} is {text!r}",
                "on Kubernetes it names a Secret of the namespace and a key in it",
                f"e.g. `secrets: {{{name}: my-secret/token}}`",
            )
    shared = spec.volume.id or spec.volume.size_gb
    for number, what in ((spec.nodes, "nodes"), (kube.prepare_workers, "kubernetes.prepare_workers")):
        if number > 1 and not shared:
            raise ConfigError(
                f"{what} is {number}, and the job has no volume",
                "its pods would each have a disk of their own: what one writes the others do not see",
                "set volume.id to a claim that several nodes may write (ReadWriteMany), or volume.size_gb",
            )
    if spec.upload and not shared:
        raise ConfigError(
            "upload is set, and the job has no volume",
            "the files would be gone with the pod that took them",
            "set volume.size_gb or volume.id, or read the data from s3:// or the Hub",
        )
    if kube.prepare_workers > 1 and spec.boot:
        raise ConfigError(
            f"kubernetes.prepare_workers is {kube.prepare_workers}, and boot is set",
            "the boot stages make the shards first, on the training's first node",
            "make the shards beforehand (`trainway data shard`), or leave prepare_workers at 1",
        )
    if kube.kind == "statefulset" and kube.queue:
        raise ConfigError(
            "kubernetes.queue is set, and kubernetes.kind is statefulset",
            "what never finishes is no work for a queue",
            "use `kind: job` or `kind: jobset`",
        )
    if quantity(kube.shm, "kubernetes.shm") > quantity(kube.memory, "kubernetes.memory"):
        raise ConfigError(
            f"kubernetes.shm is {kube.shm}, and kubernetes.memory is {kube.memory}",
            "/dev/shm is part of the pod's memory",
            "make shm smaller, or memory larger",
        )
    cores = quantity(kube.cpu, "kubernetes.cpu")
    if kube.cpu_limit is not None and quantity(kube.cpu_limit, "kubernetes.cpu_limit") < cores:
        raise ConfigError(
            f"kubernetes.cpu_limit is {kube.cpu_limit}, and kubernetes.cpu is {kube.cpu}",
            "a pod cannot ask for more than it may use",
            "make cpu_limit larger, or cpu smaller",
        )


_POWERS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18, "m": -3}


def quantity(text: str, name: str) -> Decimal:
    """The number that a quantity of Kubernetes means. Raises ConfigError when it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:([KMGTPE])i|([kMGTPEm]?))", text)
    if found is None:
        raise ConfigError(f"{name} is {text!r}", "it is a quantity of Kubernetes", "e.g. 64Gi, or 8 cores")
    if found[2]:
        return Decimal(found[1]) * 1024 ** ("KMGTPE".index(found[2]) + 1)
    return Decimal(found[1]) * Decimal(10) ** _POWERS[found[3]]


def _notes(job: Job) -> list[str]:
    spec, kube = job.spec, job.spec.kubernetes
    notes = []
    if kube.kind == "statefulset":
        notes.append(
            "a StatefulSet starts a pod that ends again and again: a finished run sleeps there and holds its GPUs "
            "until `trainway down`; `kind: job` gives them back"
        )
    if not (spec.volume.id or spec.volume.size_gb):
        notes.append(
            "no volume: what the pod writes is gone with it, and a pod that is replaced begins at step 0; set volume.size_gb"
        )
    if kube.infiniband:
        notes.append(
            "InfiniBand: the nodes' container runtime must allow locked memory without limit (LimitMEMLOCK=infinity); "
            "a process that is not root gets nothing from IPC_LOCK alone; a namespace of the Pod Security Standard "
            "`restricted` refuses IPC_LOCK"
        )
    return notes


def _object(api: str, kind: str, name: str, job: Job, names: Names, role: Role | None = None) -> Manifest:
    metadata: Manifest = {
        "name": name,
        "namespace": job.spec.kubernetes.namespace,
        "labels": names.own_labels(role),
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _claim(job: Job, names: Names) -> Manifest:
    several = job.spec.nodes > 1 or job.spec.kubernetes.prepare_workers > 1
    spec: Manifest = {
        "accessModes": ["ReadWriteMany" if several else "ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{job.spec.volume.size_gb}G"}},
    }
    if job.spec.volume.storage_class:
        spec["storageClassName"] = job.spec.volume.storage_class
    return {**_object("v1", "PersistentVolumeClaim", names.claim, job, names), "spec": spec}


def _settings(job: Job, names: Names) -> Manifest:
    orders = job.orders
    data = {
        ORDERS_FILE: orders.model_dump_json(indent=1) + "\n",
        CONFIG_FILE: yaml.safe_dump(orders.config, sort_keys=False, allow_unicode=True, width=110),
    }
    size = sum(len(text.encode()) for text in data.values())
    if size > LARGEST_SETTINGS:
        raise ConfigError(
            f"the run's settings take {size:,} bytes",
            f"a ConfigMap holds at most {LARGEST_SETTINGS:,}",
            "name files by a pattern, e.g. shard-*.jsonl, rather than each of them",
        )
    return {**_object("v1", "ConfigMap", names.settings, job, names), "data": data}


def _service(job: Job, names: Names) -> Manifest:
    """Gives each pod a name of its own, before it is ready too: the nodes meet before they are."""
    return {
        **_object("v1", "Service", names.base, job, names),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": names.labels("train"),
        },
    }


def _upload(job: Job, names: Names, claim: str | None) -> Manifest:
    spec = pod_spec(job, names, "upload", claim)
    spec["activeDeadlineSeconds"] = seconds(job.spec.limits.upload_minutes * 60)
    return {**_object("v1", "Pod", names.upload, job, names, "upload"), "spec": spec}


def _prepare(job: Job, names: Names, claim: str | None) -> Manifest:
    workers = job.spec.kubernetes.prepare_workers
    return {
        **_object("batch/v1", "Job", names.prepare, job, names, "prepare"),
        "spec": _job_spec(job, names, "prepare", claim, workers, failures=3 * workers)
        | {"ttlSecondsAfterFinished": KEEP_FINISHED_S},
    }


def _workload(job: Job, names: Names, claim: str | None) -> Manifest:
    kind = job.spec.kubernetes.kind
    build_kind = {"job": _job, "jobset": _jobset, "statefulset": _statefulset}[kind]
    manifest = build_kind(job, names, claim)
    if job.orders.dollars_per_hour:
        manifest["metadata"]["annotations"] = {PRICE: str(job.orders.dollars_per_hour)}
    if queue := job.spec.kubernetes.queue:
        manifest["metadata"]["labels"] = {**manifest["metadata"]["labels"], QUEUE: queue}
        manifest["spec"]["suspend"] = True  # until the queue lets it go
    return manifest


def _job(job: Job, names: Names, claim: str | None) -> Manifest:
    # A restart of the whole run can cost every node one pod.
    failures = job.spec.limits.restarts * job.spec.nodes
    return {
        **_object("batch/v1", "Job", names.base, job, names, "train"),
        "spec": _job_spec(job, names, "train", claim, job.spec.nodes, failures)
        | {"ttlSecondsAfterFinished": KEEP_FINISHED_S, "suspend": False},
    }


def _job_spec(
    job: Job, names: Names, role: Role, claim: str | None, pods: int, failures: int
) -> dict[str, Any]:
    on_codes = {"containerName": CONTAINER, "operator": "In", "values": NEVER_AGAIN}
    rules: list[Manifest] = [{"action": "FailJob", "onExitCodes": on_codes}]
    if role == "prepare" or job.spec.kubernetes.kind != "jobset":
        # Evicted, preempted or drained: no fault of the run. A JobSet has to see it, to start all nodes again.
        disrupted = {"type": "DisruptionTarget", "status": "True"}
        rules.insert(0, {"action": "Ignore", "onPodConditions": [disrupted]})
    return {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": failures,
        "podReplacementPolicy": "Failed",  # never two pods of one rank at the same checkpoint
        "activeDeadlineSeconds": deadline_s(job),
        "podFailurePolicy": {"rules": rules},
        "template": pod_template(job, names, role, claim),
    }


def _jobset(job: Job, names: Names, claim: str | None) -> Manifest:
    """All nodes are started again together: the Job itself replaces no failed pod."""
    return {
        **_object("jobset.x-k8s.io/v1alpha2", "JobSet", names.base, job, names, "train"),
        "spec": {
            "suspend": False,
            "ttlSecondsAfterFinished": KEEP_FINISHED_S,
            "network": {
                "enableDNSHostnames": True,
                "publishNotReadyAddresses": True,
                "subdomain": names.base,
            },
            "failurePolicy": {
                "maxRestarts": job.spec.limits.restarts,
                "rules": [
                    {
                        "name": "neverAgain",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": REPLICATED,
                    "replicas": 1,
                    "template": {
                        "metadata": {"labels": names.labels("train")},
                        "spec": _job_spec(job, names, "train", claim, job.spec.nodes, failures=0),
                    },
                }
            ],
        },
    }


def _statefulset(job: Job, names: Names, claim: str | None) -> Manifest:
    return {
        **_object("apps/v1", "StatefulSet", names.base, job, names, "train"),
        "spec": {
            "serviceName": names.base,
            "replicas": job.spec.nodes,
            "podManagementPolicy": "Parallel",  # the nodes wait for each other
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": names.labels("train")},
            "template": pod_template(job, names, "train", claim),
        },
    }


def deadline_s(job: Job) -> int:
    """When the cluster ends the job if it has not ended itself."""
    hours = job.orders.limits.hours
    assert hours is not None  # the orders have them settled
    waiting = job.spec.limits.upload_minutes * 60 if job.spec.upload else 0
    return seconds(hours * 3600 + waiting) + job.spec.kubernetes.grace_s + SPARE_S


def seconds(number: float) -> int:
    return max(1, round(number))
