"""A job's manifests as files for other tools: kubectl, kustomize, Kubeflow Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainway.errors import ConfigError
from trainway.files import atomic_write
from trainway.jobs.kubernetes.manifests import build
from trainway.jobs.kubernetes.names import REPLICATED
from trainway.jobs.kubernetes.pod import Manifest
from trainway.jobs.record import Record
from trainway.jobs.target import Job

KUSTOMIZATION = "kustomization.yaml"
TRAINER = "trainer.kubeflow.org/v1alpha1"
STEP = "trainer.kubeflow.org/trainjob-ancestor-step"


def export_manifests(job: Job, record: Record, folder: Path, *, trainjob: bool = False) -> list[Path]:
    """Write what `up` would create, one YAML file an object, and a kustomization.yaml; nothing is sent.

    The files are numbered in the order of their creation. With `trainjob` the workload is a TrainingRuntime and a
    TrainJob of Kubeflow Trainer. Returns the files; `kubectl apply -k FOLDER` creates all.
    Raises ConfigError for a job of which manifests alone would not run.
    """
    _check(job, trainjob)
    manifests = build(job, record)
    objects = manifests.all()
    if trainjob:
        objects = [*objects[:-1], *_trainjob(job, manifests.workload)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, manifest in enumerate(objects, start=1):
        path = folder / f"{number}-{manifest['kind'].lower()}.yaml"
        atomic_write(path, yaml_text(manifest))
        paths.append(path)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [path.name for path in paths],
    }
    atomic_write(folder / KUSTOMIZATION, yaml_text(kustomization))
    return [*paths, folder / KUSTOMIZATION]


def yaml_text(value: Any) -> str:
    """As YAML without anchors: some tools take none."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    text: str = yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=110)
    return text


def _check(job: Job, trainjob: bool) -> None:
    if job.spec.upload:
        raise ConfigError(
            "upload is set, and manifests bring no files",
            "the job would wait for them until its time is up",
            "put the files on the volume first and take upload out, or use `trainway up` without --export",
        )
    if job.spec.kubernetes.prepare_workers > 1:
        raise ConfigError(
            f"kubernetes.prepare_workers is {job.spec.kubernetes.prepare_workers}, and manifests have no order",
            "the training would start, and hold its GPUs, beside the preparation",
            "set kubernetes.prepare_workers=1, or use `trainway up` without --export",
        )
    if trainjob and job.spec.kubernetes.kind != "jobset":
        raise ConfigError(
            f"a TrainJob is asked for, and kubernetes.kind is {job.spec.kubernetes.kind}",
            "Kubeflow Trainer makes JobSets",
            "set kubernetes.kind=jobset",
        )


def _trainjob(job: Job, jobset: Manifest) -> list[Manifest]:
    """A TrainingRuntime that holds the whole JobSet, and the TrainJob that runs it.

    The runtime has no torch policy: it would set a second way to meet beside that of the launcher.
    """
    metadata, spec = jobset["metadata"], {**jobset["spec"]}
    for owned in ("suspend", "ttlSecondsAfterFinished"):  # the TrainJob's own
        spec.pop(owned)
    [replicated] = spec["replicatedJobs"]
    labels = {**replicated["template"]["metadata"]["labels"], STEP: "trainer"}
    template = {**replicated["template"], "metadata": {"labels": labels}}
    spec["replicatedJobs"] = [{**replicated, "name": REPLICATED, "template": template}]
    runtime = {
        "apiVersion": TRAINER,
        "kind": "TrainingRuntime",
        "metadata": metadata,
        "spec": {"mlPolicy": {"numNodes": job.spec.nodes}, "template": {"spec": spec}},
    }
    train = {
        "apiVersion": TRAINER,
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": metadata["name"]},
            "suspend": jobset["spec"]["suspend"],
        },
    }  # fmt: skip
    return [runtime, train]
