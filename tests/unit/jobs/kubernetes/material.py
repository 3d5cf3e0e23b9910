"""Jobs of every kind for Kubernetes, and a cluster that keeps objects."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trainway.jobs.kubernetes.cluster import Cluster
from trainway.jobs.kubernetes.names import INDEX, Names
from trainway.jobs.load import load_job
from trainway.jobs.record import Record
from trainway.jobs.target import Job

HOSTILE = [
    "$(touch x);'\"",
    "$(HF_TOKEN) $$(HF_TOKEN) $",
    "{a: b}",
    "!!python/object:os.system x",
    "---\n- x",
    "a\nb: c\n",
    "# not: a comment",
    "*alias &anchor",
]
ODD = {f"ODD_{number}": text for number, text in enumerate(HOSTILE)}

JOBS: dict[str, dict[str, Any]] = {
    "cpu": {"volume": {"size_gb": 20}},
    "one_gpu": {
        "gpus": ["A100 80GB"],
        "volume": {"id": "data"},
        "secrets": {"HF_TOKEN": "hub/token", "WANDB_API_KEY": "wandb/api.key"},
    },
    "nodes": {"gpus": [{"name": "H100 SXM", "count": 8}], "nodes": 4, "volume": {"id": "shared"}},
    "infiniband": {
        "gpus": [{"name": "H100 SXM", "count": 8, "price": 2.5}],
        "nodes": 2,
        "volume": {"size_gb": 100, "storage_class": "fast"},
        "kubernetes": {"infiniband": True},
    },
    "queue": {"gpus": ["L40S"], "nodes": 2, "volume": {"id": "shared"}, "kubernetes": {"queue": "team"}},
    "jobset": {"gpus": ["L40S"], "volume": {"size_gb": 5}, "kubernetes": {"kind": "jobset"}},
    "jobset_nodes": {
        "gpus": ["L40S"],
        "nodes": 3,
        "volume": {"id": "shared"},
        "kubernetes": {"kind": "jobset", "queue": "team", "infiniband": True},
    },
    "statefulset": {"volume": {"size_gb": 5}, "kubernetes": {"kind": "statefulset"}},
    "statefulset_nodes": {"nodes": 3, "volume": {"id": "shared"}, "kubernetes": {"kind": "statefulset"}},
    "prepare": {"gpus": ["L40S"], "volume": {"size_gb": 5}, "kubernetes": {"prepare_workers": 4}},
    "upload": {"volume": {"size_gb": 5}, "upload": ["job.yaml"]},
    "odd": {
        "env": ODD,
        "kubernetes": {
            "gpu_resource": "amd.com/gpu",
            "node_selector": {"pool": HOSTILE[0]},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
    },
}


def make_job(folder: Path, name: str = "cpu", **changes: Any) -> Job:
    """One of JOBS, read from a file as a user's would be."""
    settings = {
        "name": "tune-7b",
        "config": "cpu_small",
        "target": "kubernetes",
        "image": "registry.example/trainway:0.1",
        "settings": {"data.train": ["data/corpus.jsonl"]},
        "limits": {"hours": 4},
        **JOBS[name],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_job(path)


def make_record(job: Job, token: str = "0badcafe") -> Record:
    return Record(name=job.spec.name, target="kubernetes", token=token, created=1_700_000_000.0)


def pod(job: Job, record: Record, index: int = 0, role: str = "train", **status: Any) -> dict[str, Any]:
    """A pod of the job as the cluster would make it."""
    names = Names.of(record)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{names.base}-{role}-{index}",
            "namespace": job.spec.kubernetes.namespace,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {**names.labels(role), INDEX: str(index)},  # type: ignore[arg-type]
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": names.base, "uid": "1"}],
        },
        "status": {"phase": "Pending", **status},
    }


RUNNING = {
    "phase": "Running",
    "containerStatuses": [{"name": "trainway", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
}


def ended(code: int, **words: Any) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, **words}}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"name": "trainway", "state": state}]}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"name": "trainway", "state": state}]}


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
}

RESOURCES = (
    "v1/configmaps", "v1/events", "v1/persistentvolumeclaims", "v1/pods", "v1/services", "batch/v1/jobs",
    "apps/v1/statefulsets", "jobset.x-k8s.io/v1alpha2/jobsets",
)  # fmt: skip


@contextmanager
def fake_cluster(*, without: tuple[str, ...] = ()) -> Iterator[tuple[Cluster, Any]]:
    """(client, server) of an API that keeps objects, with real 404 and 409, and has no controllers."""
    import kmock
    from kubernetes import client

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def serve(begun: Callable[[Any], None], done: asyncio.Event) -> None:
        async with kmock.KubernetesEmulator() as handler, kmock.Server(handler):
            for name in RESOURCES:
                if name not in without:
                    handler.resources[name] = {}
            begun(handler)
            await done.wait()

    started = threading.Event()
    held: list[Any] = []
    done = asyncio.Event()
    future = asyncio.run_coroutine_threadsafe(
        serve(lambda handler: (held.append(handler), started.set()), done),  # type: ignore[arg-type, func-returns-value]
        loop,
    )
    try:
        assert started.wait(60), future.exception()
        settings = client.Configuration(host=str(held[0].url).rstrip("/"))
        settings.retries = False
        yield Cluster(client.ApiClient(settings), "default"), held[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        future.result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
