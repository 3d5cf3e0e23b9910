"""What RunPod is asked for: the exact body of a pod or a cluster, and what is refused before anything is asked."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from trainway.errors import ConfigError
from trainway.jobs.orders import ORDERS_VARIABLE, Orders
from trainway.jobs.origin import UNKNOWN, known_origin
from trainway.jobs.record import Record
from trainway.jobs.runpod.gpus import gpu_type_id
from trainway.jobs.runpod.models import (
    LEAST_VOLUME_GB,
    MOST_VARIABLES,
    MOST_VOLUME_GB,
    ORIGIN_VARIABLE,
    Compute,
    CreateCluster,
    CreatePod,
    CreateVolume,
    GpuRequest,
    Mounts,
    NetworkMount,
)
from trainway.jobs.runpod.source import source_words
from trainway.jobs.spec import GpuChoice, JobSpec
from trainway.jobs.target import Job
from trainway.masking import holds_token
from trainway.recipes.volume import ERASED

BOOTSTRAP_VARIABLE = "TRAINWAY_BOOTSTRAP"
SOURCE_VARIABLE = "TRAINWAY_SOURCE"
ARGS = f"python3 -c 'import base64,os;exec(base64.b64decode(os.environ[\"{BOOTSTRAP_VARIABLE}\"]))'"
"""The container's command: no value of the user's is in it."""
SSH_PORT = "22/tcp"
NEW_VOLUME = "NEW"
"""Stands for the id of a volume that is not there yet."""
_OURS = re.compile(r"RUNPOD_.*|TRAINWAY_.*|PUBLIC_KEY|JUPYTER_PASSWORD")
_SECRET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_SECRET_REFERENCE = re.compile(r"\{\{\s*RUNPOD_SECRET_")
_INERT = re.compile(r'[^A-Za-z0-9{}\[\]",:._/+\\-]')


def body_of(
    job: Job,
    record: Record,
    choice: GpuChoice,
    *,
    volume_id: str | None,
    data_centers: Sequence[str],
    dollars_per_hour: float,
) -> CreatePod | CreateCluster:
    """The body of POST /pods for one candidate, or of POST /clusters for several nodes.

    dollars_per_hour: of all nodes; the machine ends itself by it. Raises ConfigError for what RunPod would not take.
    """
    orders = job.orders.model_copy(update={"ender": "runpod", "dollars_per_hour": dollars_per_hour})
    mounts = None
    if volume_id is not None:
        mounts = Mounts(network=(NetworkMount(volume_id=volume_id, path=orders.root),))
    shared: dict[str, Any] = {
        "name": record.remote_name,
        "image": job.spec.image,
        "args": ARGS,
        "disk": job.spec.disk_gb,
        "env": variables(job, orders),
        "ports": (SSH_PORT,),
        "mounts": mounts,
        "data_center_ids": tuple(data_centers) or None,
        "start_ssh": True,
    }
    type_id = gpu_type_id(choice.name)
    settings = job.spec.runpod
    try:
        if job.spec.nodes > 1:
            compute = Compute(gpu_type_id=type_id, gpu_count_per_pod=choice.count, pod_count=job.spec.nodes)
            return CreateCluster(**shared, compute=compute)
        gpu = GpuRequest(id=type_id, count=choice.count, min_cuda_version=settings.min_cuda)
        return CreatePod(**shared, gpu=gpu, cloud=settings.cloud, registry=settings.registry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            "RunPod would not take this job", f"{place}: {first['msg']}", "correct the job file"
        ) from None


def volume_body(job: Job, record: Record, data_center: str) -> CreateVolume | None:
    """The body of POST /network-volumes; None for a job that has a volume, or wants none. Raises ConfigError."""
    size = job.spec.volume.size_gb
    if size is None or job.spec.volume.id is not None:
        return None
    if not LEAST_VOLUME_GB <= size <= MOST_VOLUME_GB:
        raise ConfigError(
            f"volume.size_gb is {size}",
            f"RunPod's network volumes have {LEAST_VOLUME_GB} to {MOST_VOLUME_GB} GB",
            "correct it, or name a volume that is there: `volume: {id: ...}`",
        )
    return CreateVolume(name=record.remote_name, size=size, data_center=data_center)


def variables(job: Job, orders: Orders) -> dict[str, str]:
    """The container's environment. No secret is in it: RunPod puts those in the place of their names."""
    found = dict(job.spec.env)
    for name, secret in job.spec.secrets.items():
        found[name] = "{{ RUNPOD_SECRET_" + secret + " }}"
    program = Path(__file__).with_name("bootstrap.py").read_bytes()
    found[BOOTSTRAP_VARIABLE] = base64.b64encode(program).decode()
    found[SOURCE_VARIABLE] = source_words(job)
    found[ORDERS_VARIABLE] = inert_json(orders)
    found[ORIGIN_VARIABLE] = known_origin() or UNKNOWN
    return found


def inert_json(orders: Orders) -> str:
    r"""The orders as JSON in which nothing means anything to a shell: the images write the environment, unquoted, into
    a file that SSH shells read. Every other character of a string is written as \uXXXX."""
    text = json.dumps(orders.model_dump(mode="json"), separators=(",", ":"))
    return _INERT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def check(job: Job) -> None:
    """Raise ConfigError for a job that RunPod would not take, or that would lose its work or its secrets there."""
    spec = job.spec
    if not spec.gpus:
        raise ConfigError(
            "the target is runpod, and no GPU is named", "", "add e.g. `gpus: [{name: A100 80GB, count: 1}]`"
        )
    _check_image(spec.image)
    _check_variables(spec)
    _check_outputs(job)
    if spec.nodes > 1:
        _check_cluster(spec)


def _check_image(image: str) -> None:
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        raise ConfigError(
            f"image is {image!r}",
            "`latest` is another image tomorrow",
            "write a tag, or a digest: NAME@sha256:...",
        )


def _check_variables(spec: JobSpec) -> None:
    for name, value in spec.env.items():
        if _OURS.fullmatch(name):
            raise ConfigError(f"env.{name} is set", "RunPod or Trainway sets it", "take it out")
        if _SECRET_REFERENCE.search(value):
            raise ConfigError(
                f"env.{name} asks for a secret",
                "env is for what anyone may see",
                f"write it as `secrets: {{{name}: NAME}}`",
            )
        if "\0" in value:
            raise ConfigError(f"env.{name} has a zero byte", "no variable can hold it", "correct it")
    for name, secret in spec.secrets.items():
        if not _SECRET_NAME.fullmatch(secret) or holds_token(secret):
            raise ConfigError(
                f"secrets.{name} is not the name of a secret",
                "it takes the name that the secret has at RunPod, never its value",
                "make one at console.runpod.io, Secrets; a value that was written here is not secret any more: revoke it",
            )
    ours = 4
    if (count := len(spec.env) + len(spec.secrets) + ours) > MOST_VARIABLES:
        raise ConfigError(
            f"the container would have {count} variables",
            f"RunPod takes {MOST_VARIABLES}, and {ours} are Trainway's",
            "use fewer",
        )


def _check_outputs(job: Job) -> None:
    """What a run makes is on a volume or is copied away: everything else on a pod is erased with it."""
    root = PurePosixPath(job.orders.root)
    places = {
        "root": str(root),
        "run_dir": job.config.run_dir or job.config.runs_dir,
        "at_end.release.to": job.orders.release.to or "",
    }
    for name, place in places.items():
        path = PurePosixPath(place)
        outside = path.is_absolute() and not path.is_relative_to(root)
        if (
            _is_erased(path)
            or (name == "root" and not path.is_absolute())
            or (outside and "://" not in place)
        ):
            if job.spec.runpod.erased_outputs and path.is_absolute():
                continue
            raise ConfigError(
                f"{name} is {place}",
                "on a pod, all but the volume is erased when it stops",
                f"use a place below {root if not _is_erased(root) else '/workspace'}, where the volume is",
            )
    has_volume = job.spec.volume.id is not None or job.spec.volume.size_gb is not None
    copies = [place for place in (job.orders.sync, job.orders.release.to) if place and "://" in place]
    if not has_volume and not copies and not job.spec.runpod.erased_outputs:
        raise ConfigError(
            "nothing that this job makes would outlive its pod",
            "it has no volume, and is copied nowhere",
            "add `volume: {size_gb: 100}` or `sync: s3://...`; `runpod: {erased_outputs: true}` if that is meant",
        )


def _is_erased(path: PurePosixPath) -> bool:
    return any(path.is_relative_to(erased) for erased in ERASED)


def _check_cluster(spec: JobSpec) -> None:
    if spec.volume.id is None and spec.volume.size_gb is None:
        raise ConfigError(
            f"nodes is {spec.nodes}, and there is no volume",
            "each node would have a disk of its own, and a checkpoint is written by all",
            "add `volume: {size_gb: 100}`",
        )
    for name in ("registry", "min_cuda"):
        if getattr(spec.runpod, name) is not None:
            raise ConfigError(
                f"runpod.{name} is set, and nodes is {spec.nodes}",
                "RunPod's clusters do not take it",
                "take it out",
            )
    if spec.runpod.cloud != "SECURE":
        raise ConfigError(
            f"runpod.cloud is {spec.runpod.cloud}, and nodes is {spec.nodes}",
            "clusters are SECURE",
            "take it out",
        )
