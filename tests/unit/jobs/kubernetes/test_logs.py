"""Lines of several pods over a server that cuts its answers anywhere: each once, in order."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from trainway.errors import EnvironmentFault
from trainway.jobs.kubernetes.cluster import Cluster, Silence
from trainway.jobs.kubernetes.logs import MOST_CUTS, job_log, pod_log

pytest.importorskip("kubernetes")

# the same moment, the same text twice, a time that steps back, an empty line, no end at the end
LINES = [
    "2026-01-01T00:00:00.000000001Z step 1",
    "2026-01-01T00:00:00.000000001Z step 1",
    "2026-01-01T00:00:00.5Z äöü",
    "2026-01-01T00:00:00.400000000Z from the other stream",
    "2026-01-01T00:00:04.000000000Z ",
    "2026-01-01T00:00:05.000000000Z 2026-01-01T00:00:05Z not a time of ours",
    "2026-01-01T00:00:09.999999999Z last, without an end",
]
TEXTS = [line.split(" ", 1)[1] for line in LINES]
LOG = "\n".join(LINES).encode()


class Server:
    """Pods whose log comes in pieces: connection k ends after `cuts[k]` bytes, those after the last are whole."""

    def __init__(self, pods: dict[str, bytes], cuts: list[int]) -> None:
        self.pods, self.cuts = pods, cuts
        self.left = {name: list(cuts) for name in pods}
        self.whole: set[str] = set()
        self.asked: list[dict[str, list[str]]] = []
        self.refused = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                outer.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlparse(request.path)
        parts = url.path.removeprefix("/api/v1/namespaces/default/pods").strip("/").split("/")
        if parts == [""]:
            self._json(request, {"items": [self.pod(name) for name in self.pods]})
        elif len(parts) == 1:
            self._json(request, self.pod(parts[0]))
        else:
            self._log(request, parts[0], parse_qs(url.query))

    def pod(self, name: str) -> dict[str, Any]:
        number = name.rpartition("-")[2]
        labels = {"trainway/token": "0badcafe", "trainway/role": "train"}
        labels["batch.kubernetes.io/job-completion-index"] = number
        phase = "Succeeded" if name in self.whole else "Running"
        return {"metadata": {"name": name, "labels": labels}, "status": {"phase": phase}}

    def _json(self, request: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _log(self, request: BaseHTTPRequestHandler, name: str, query: dict[str, list[str]]) -> None:
        self.asked.append(query)
        if self.refused:
            self.refused -= 1
            self._json(request, {"message": "the container is waiting to start"}, 400)
            return
        since = query.get("sinceTime", [""])[0].removesuffix("Z")
        body = b"\n".join(
            line for line in self.pods[name].split(b"\n") if line.decode()[: len(since)] >= since
        )
        if tail := query.get("tailLines"):
            body = b"\n".join(body.split(b"\n")[-int(tail[0]) :])
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        cut = self.left[name].pop(0) if self.left[name] else None
        piece = body if cut is None else body[:cut]
        if piece:
            request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if cut is None:
            request.wfile.write(b"0\r\n\r\n")
            self.whole.add(name)
        request.close_connection = True


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(pods: dict[str, bytes], cuts: list[int]) -> tuple[Server, Cluster]:
        from kubernetes import client

        server = Server(pods, cuts)
        servers.append(server)
        settings = client.Configuration(host=f"http://127.0.0.1:{server.http.server_port}")
        settings.retries = False
        return server, Cluster(client.ApiClient(settings), "default")

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def follow(cluster: Cluster, **options: Any) -> list[str]:
    return list(pod_log(cluster, "w-0", follow=True, tail=None, wait=lambda _: None, **options))


@pytest.mark.parametrize("cut", [0, 1, 31, 38, 39, 75, 90, 115, len(LOG) - 30, len(LOG) - 1])
def test_a_cut_loses_and_repeats_nothing(serve: Any, cut: int) -> None:
    server, cluster = serve({"w-0": LOG}, [cut])
    assert follow(cluster) == TEXTS
    if cut > 40:
        assert "sinceTime" in server.asked[1]


def test_many_cuts_lose_and_repeat_nothing(serve: Any) -> None:
    server, cluster = serve({"w-0": LOG}, [40, 80, 120, 200, 60, 250])
    assert follow(cluster) == TEXTS
    assert [query.get("follow") for query in server.asked] == [["true"]] * 7 + [None]


def test_a_log_that_is_cut_for_ever_ends_in_an_error(serve: Any) -> None:
    _, cluster = serve({"w-0": LOG}, [0] * 100)
    with pytest.raises(EnvironmentFault, match="breaks off again and again"):
        follow(cluster)


def test_lines_between_cuts_begin_the_count_anew(serve: Any) -> None:
    lines = [f"2026-01-01T00:{number:02}:00Z line {number:02}" for number in range(30)]
    size = len(lines[0]) + 1
    _, cluster = serve({"w-0": "\n".join(lines).encode() + b"\n"}, [2 * size] * 29)
    assert len(lines) > MOST_CUTS
    assert follow(cluster) == [f"line {number:02}" for number in range(30)]


def test_a_container_that_has_not_begun_is_waited_for(serve: Any) -> None:
    server, cluster = serve({"w-0": LOG}, [])
    server.refused = 3
    assert follow(cluster) == TEXTS


def test_the_last_lines_alone(serve: Any) -> None:
    _, cluster = serve({"w-0": LOG}, [])
    assert list(pod_log(cluster, "w-0", follow=False, tail=2, wait=lambda _: None)) == TEXTS[-2:]


@pytest.mark.parametrize("followed", [True, False])
def test_two_ranks_with_a_cut(serve: Any, followed: bool) -> None:
    other = b"2026-01-01T00:00:00Z [1] loss 2.5\n2026-01-01T00:00:03Z [1] loss 2.4\n"
    _, cluster = serve({"w-0": LOG, "w-1": other}, [45])
    found = list(
        job_log(
            cluster,
            "0badcafe",
            nodes=2,
            follow=followed,
            tail=None,
            is_over=lambda: True,
            wait=lambda _: None,
        )
    )
    assert [line for line in found if line.startswith("node 0 | ")] == [f"node 0 | {text}" for text in TEXTS]
    assert [line for line in found if line.startswith("node 1 | ")] == [
        "node 1 | [1] loss 2.5",
        "node 1 | [1] loss 2.4",
    ]
    assert len(found) == len(TEXTS) + 2


def test_one_node_needs_no_name(serve: Any) -> None:
    _, cluster = serve({"w-0": LOG}, [])
    options: dict[str, Any] = {"nodes": 1, "follow": False, "tail": None, "is_over": lambda: True}
    assert list(job_log(cluster, "0badcafe", **options)) == TEXTS


class Told:
    """A cluster of one pod: what each connection to its log brings, and what the pod is afterwards."""

    namespace = "default"

    def __init__(self, connections: list[tuple[list[bytes], Exception | None]], pods: list[Any]) -> None:
        self.connections, self.states = connections, pods

    def log(self, pod: str, container: str, **asked: Any) -> Iterator[bytes]:
        blocks, fault = self.connections.pop(0)
        yield from blocks
        if fault is not None:
            raise fault

    def find(self, kind: str, name: str) -> Any:
        return self.states.pop(0)


def state(uid: str, phase: str = "Running") -> dict[str, Any]:
    return {"metadata": {"name": "w-0", "uid": uid}, "status": {"phase": phase}}


def test_a_pod_may_say_nothing_for_hours() -> None:
    silences: list[tuple[list[bytes], Exception | None]] = [([], Silence()) for _ in range(3 * MOST_CUTS)]
    last = f"{LINES[0]}\n".encode()
    cluster: Any = Told(
        [*silences, ([last], None), ([last], None)], [state("a")] * 30 + [state("a", "Succeeded")]
    )
    assert list(pod_log(cluster, "w-0", follow=True, tail=None, uid="a", wait=lambda _: None)) == ["step 1"]


def test_silence_in_the_middle_of_what_is_there_is_a_fault() -> None:
    cluster: Any = Told([([], Silence()) for _ in range(MOST_CUTS + 1)], [])
    with pytest.raises(EnvironmentFault, match="breaks off"):
        list(pod_log(cluster, "w-0", follow=False, tail=None, wait=lambda _: None))


def test_another_pod_of_the_same_name_is_another_pod() -> None:
    """A StatefulSet makes a pod that was drained anew, under its name."""
    cluster: Any = Told([([f"{LINES[0]}\n".encode()], None)], [state("b")])
    assert list(pod_log(cluster, "w-0", follow=True, tail=None, uid="a", wait=lambda _: None)) == ["step 1"]


def test_the_pod_that_replaces_one_of_its_name_is_followed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainway.jobs.kubernetes.logs.POLL_S", 0.01)

    class Replaced:
        namespace, uid = "default", "a"

        def pod(self) -> dict[str, Any]:
            found = state(self.uid, "Running" if self.uid == "a" else "Succeeded")
            found["metadata"]["labels"] = {"trainway/role": "train"}
            return found

        def list(self, kind: str, labels: str) -> list[Any]:
            return [self.pod()]

        def log(self, pod: str, container: str, **asked: Any) -> Iterator[bytes]:
            yield f"2026-01-01T00:00:00Z of pod {self.uid}\n".encode()

        def find(self, kind: str, name: str) -> Any:
            self.uid = "b"  # it was drained, and made anew elsewhere
            return self.pod()

    cluster: Any = Replaced()
    lines = job_log(
        cluster,
        "0badcafe",
        nodes=1,
        follow=True,
        tail=None,
        is_over=lambda: cluster.uid == "b",
        wait=lambda _: None,
    )
    assert list(lines) == ["of pod a", "of pod b"]
