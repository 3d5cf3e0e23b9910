"""The pod of a job as data: one template for the Job, the JobSet, the StatefulSet, the preparation and the upload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainway.config.mixes import train_sources
from trainway.config.rules import is_local
from trainway.data.hub_sources import hub_source
from trainway.jobs.hub import hub_repository
from trainway.jobs.kubernetes.names import (
    CONFIG_FILE,
    CONTAINER,
    HOME_DIR,
    ORDERS_FILE,
    POD_INDEX,
    REPLICATED,
    SETTINGS_DIR,
    Names,
    Role,
    literal,
    secret_reference,
)
from trainway.jobs.target import Job, chosen_gpu
from trainway.launch.nodes import DEFAULT_PORT
from trainway.recipes.volume import HUB_DIR

Manifest = dict[str, Any]

TRAIN = ("python", "-m", "trainway.pod", f"{SETTINGS_DIR}/{ORDERS_FILE}")
"""Not through a shell: SIGTERM reaches it."""
TRAIN_FOREVER = ("python", "-m", "trainway.jobs.kubernetes.forever", f"{SETTINGS_DIR}/{ORDERS_FILE}")
WAIT = ("python", "-c", "import signal, time; signal.signal(15, lambda *_: exit()); time.sleep(10**8)")
"""For files to come; as the first process of a container it has to take SIGTERM itself."""
HOSTNAME_KEY = "kubernetes.io/hostname"
NOWHERE = Path("/nonexistent")
"""What is on this machine says nothing of the job's."""


def prepare_command(job: Job) -> tuple[str, ...]:
    workers = str(job.spec.kubernetes.prepare_workers)
    return (
        "python", "-m", "trainway", "prepare", f"{SETTINGS_DIR}/{CONFIG_FILE}",
        "--num-workers", workers, "--worker-index", "auto", "--merge",
    )  # fmt: skip


def pod_template(job: Job, names: Names, role: Role, claim: str | None) -> Manifest:
    """Metadata and spec of a pod; `claim`: the PersistentVolumeClaim at the job's root, None for the node's own disk."""
    return {"metadata": {"labels": names.labels(role)}, "spec": pod_spec(job, names, role, claim)}


def pod_spec(job: Job, names: Names, role: Role, claim: str | None) -> Manifest:
    kube = job.spec.kubernetes
    several = role == "train" and job.spec.nodes > 1
    spec: Manifest = {
        "restartPolicy": "Always" if kube.kind == "statefulset" and role == "train" else "Never",
        "terminationGracePeriodSeconds": kube.grace_s if role == "train" else 60,
        "automountServiceAccountToken": False,
        # A Service called `master` in the namespace would set MASTER_PORT to an address.
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": kube.user_id,
            "runAsGroup": kube.user_id,
            "fsGroup": kube.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, names, role)],
        "volumes": _volumes(job, names, role, claim),
    }
    if role == "train" and kube.kind != "jobset":  # a JobSet has a Service of its own
        spec["subdomain"] = names.base
    # a new volume is made where its first pod is, and often cannot be mounted from another zone
    makes_volume = role == "upload" and job.spec.volume.size_gb is not None
    if kube.node_selector and (role == "train" or makes_volume):
        spec["nodeSelector"] = dict(kube.node_selector)
    if kube.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in kube.tolerations]
    return spec | (_spread(names) if several else {})


def _spread(names: Names) -> Manifest:
    """On a machine each where the cluster has as many; where it has not, a job on fewer is better than none."""
    same = {"matchLabels": names.labels("train")}
    term = {"labelSelector": same, "topologyKey": HOSTNAME_KEY}
    return {
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]
            }
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": HOSTNAME_KEY,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": same,
            }
        ],
    }


def _container(job: Job, names: Names, role: Role) -> Manifest:
    train = TRAIN_FOREVER if job.spec.kubernetes.kind == "statefulset" else TRAIN
    command: Sequence[str] = {"train": train, "prepare": prepare_command(job), "upload": WAIT}[role]
    infiniband = job.spec.kubernetes.infiniband and role == "train"
    return {
        "name": CONTAINER,
        "image": job.spec.image,
        "command": [literal(word) for word in command],
        "workingDir": job.orders.root,
        "env": environment(job, names, role),
        "resources": resources(job, role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if infiniband else {}),
        },
        # what a failed pod said last is told by `status`
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "data", "mountPath": job.orders.root},
            {"name": "settings", "mountPath": SETTINGS_DIR, "readOnly": True},
            {"name": "home", "mountPath": HOME_DIR},
            {"name": "tmp", "mountPath": "/tmp"},
            *([{"name": "shm", "mountPath": "/dev/shm"}] if role != "upload" else []),
        ],
    }


def resources(job: Job, role: Role) -> Manifest:
    """Requests and limits as strings. Cores have no limit, unless the namespace's quota asks for one: a pod held back while
    others idle helps nobody."""
    kube = job.spec.kubernetes
    if role == "upload":
        most = {"memory": "512Mi"} | ({"cpu": "250m"} if kube.cpu_limit else {})
        return {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": most}
    both = {"memory": kube.memory}
    gpu = chosen_gpu(job)
    if role == "train":
        both |= {kube.gpu_resource: str(gpu.count)} if gpu else {}
        both |= {"rdma/hca": "1"} if kube.infiniband else {}
    return {
        "requests": {"cpu": kube.cpu, **both},
        "limits": both | ({"cpu": kube.cpu_limit} if kube.cpu_limit else {}),
    }


def environment(job: Job, names: Names, role: Role) -> list[Manifest]:
    """The container's variables: the user's own win over ours. Secret values are references."""
    values = _own_variables(job) | (_meeting(job, names) if role == "train" else {}) | job.spec.env
    found: list[Manifest] = [
        {"name": name, "value": literal(value)}
        for name, value in values.items()
        if name not in job.spec.secrets  # of two of one name the API takes the last, or refuses both
    ]
    if role == "upload":  # it runs nothing of the user's
        return found
    if role == "train" and job.spec.kubernetes.kind == "statefulset" and job.spec.nodes > 1:
        path = f"metadata.labels['{POD_INDEX}']"
        found.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": path}}})
    for name, text in job.spec.secrets.items():
        reference = secret_reference(text)
        assert reference is not None  # checked before
        secret, key = reference
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _own_variables(job: Job) -> dict[str, str]:
    values = {
        "HOME": HOME_DIR,
        "USER": "trainway",  # the number of the user has no name in the image, and some libraries ask for one
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": f"{job.orders.root.rstrip('/')}/{HUB_DIR}",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
    }
    return values | ({"HF_HUB_OFFLINE": "1"} if is_offline(job) else {})


def _meeting(job: Job, names: Names) -> dict[str, str]:
    """Where the nodes meet. JOB_COMPLETION_INDEX, the rank, comes from Kubernetes; interfaces are found by the launcher."""
    if job.spec.nodes == 1:
        return {}
    middle = f"-{REPLICATED}-0" if job.spec.kubernetes.kind == "jobset" else ""
    return {
        "NUM_NODES": str(job.spec.nodes),
        "MASTER_ADDR": f"{names.base}{middle}-0.{names.base}",
        "MASTER_PORT": str(DEFAULT_PORT),
    }


def is_offline(job: Job) -> bool:
    """Whether the run takes nothing from the Hub and sends nothing there, by the way its paths are written.

    Then the Hub's libraries are told so, and a slow or blocked network cannot hold the run up. In doubt it is not.
    """
    config = job.config
    if config.recipe == "gad" or config.release.push_to_hub or hub_repository(job.orders.release.to):
        return False
    if any(path is not None and not is_local(path) for path in (config.model.path, config.tokenizer.path)):
        return False
    # documents of pretraining are always local
    return config.recipe == "pretrain" or not any(
        hub_source(path, NOWHERE)
        for path in [*(source.path for source in train_sources(config.data)), *config.data.validation]
    )


def _volumes(job: Job, names: Names, role: Role, claim: str | None) -> list[Manifest]:
    disk = {"sizeLimit": f"{job.spec.disk_gb}G"}
    data: Manifest = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": disk}
    memory = {"medium": "Memory", "sizeLimit": job.spec.kubernetes.shm}
    return [
        {"name": "data", **data},
        {"name": "settings", "configMap": {"name": names.settings}},
        {"name": "home", "emptyDir": disk},
        {"name": "tmp", "emptyDir": disk},
        *([{"name": "shm", "emptyDir": memory}] if role != "upload" else []),
    ]
