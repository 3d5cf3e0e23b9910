"""Our requests and what we read, against a mock server that Prism makes of RunPod's own OpenAPI document."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.fakes_runpod import KEY
from tests.runpod_contract import DOCUMENT, SPECS_VARIABLE
from tests.unit.jobs.runpod.conftest import Time
from tests.unit.jobs.runpod.test_api import BODY
from trainway.jobs.runpod import models
from trainway.jobs.runpod.api import Api, Refused
from trainway.jobs.runpod.logs import pod_lines

PRISM = os.environ.get("TRAINWAY_PRISM") or shutil.which("prism")
SPECS = os.environ.get(SPECS_VARIABLE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PRISM is None, reason="prism is not on PATH, and TRAINWAY_PRISM is not set"),
    pytest.mark.skipif(SPECS is None, reason=f"{SPECS_VARIABLE} is not set"),
]
SINCE = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert PRISM is not None and SPECS is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("prism") / "log"
    command = [
        PRISM,
        "mock",
        "--errors",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        str(Path(SPECS) / DOCUMENT),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 600
        while b"Prism is listening" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v2"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def prism(url: str) -> Iterator[Api]:
    with Api(url, KEY, clock=Time().clock, timeout_s=120) as found:
        yield found


def test_pods(prism: Api) -> None:
    pod = prism.create_pod(BODY)
    assert pod.status in ("PROVISIONING", "STARTING", "RUNNING")
    assert prism._ask("list the pods", "GET", "/pods", models.PodList).pods
    assert prism.list_pods() == []  # the document's example is named as somebody else's
    assert prism.find_pod(pod.id) is not None
    stopped = prism.act(pod.id, "stop")
    assert stopped is None or stopped.id
    prism.delete_pod(pod.id)
    lines = list(pod_lines(prism, pod, follow=False, tail=5))
    assert lines == ["Model loaded."]


def test_clusters_volumes_catalogue_keys_bills(prism: Api) -> None:
    body = BODY.model_dump(exclude={"gpu", "cloud", "registry"})
    compute = models.Compute(gpu_type_id="NVIDIA H200", gpu_count_per_pod=8, pod_count=2)
    cluster = prism.create_cluster(models.CreateCluster(**body, compute=compute))
    assert prism.find_cluster(cluster.id) is not None and prism.list_clusters() == []
    assert prism._ask("list the clusters", "GET", "/clusters", models.ClusterList).clusters
    assert isinstance(prism.cluster_pods(cluster.id), list)
    prism.delete_cluster(cluster.id)
    volume = prism.create_volume(models.CreateVolume(name="v", size=50, data_center="US-KS-2"))
    assert prism.find_volume(volume.id) is not None and prism.list_volumes()
    prism.delete_volume(volume.id)
    assert prism.gpu_types(count=2, cloud="SECURE")[0].price.secure > 0
    assert prism.data_centers()
    assert prism.ssh_keys() and prism.set_ssh_keys(models.SetKeys(keys=("ssh-ed25519 AAAA me",)))
    assert prism.pod_bill("p", SINCE).metadata.totals.total_amount >= 0
    assert prism.cluster_bill("c", SINCE).metadata.totals.total_amount >= 0


@pytest.mark.parametrize("status", [400, 401, 403, 422, 429])
def test_refusals(prism: Api, status: int) -> None:
    prism._client.headers["Prefer"] = f"code={status}"
    with pytest.raises(Refused) as caught:
        prism.create_pod(BODY)
    assert caught.value.status == status and caught.value.words


def test_a_body_that_breaks_the_document_is_refused(prism: Api) -> None:
    answer = httpx.post(
        f"{prism.base}/pods", json={"name": ""}, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
    )
    assert answer.status_code == 422
