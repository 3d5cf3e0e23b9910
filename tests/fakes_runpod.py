"""A RunPod on this machine: pods, clusters, volumes, keys, catalogue, logs and bills over real HTTP, failing on demand.

What it gets and what it says is checked by the project's own models always, and by RunPod's OpenAPI document where
TRAINWAY_SPECS names the directory that holds it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tests.runpod_contract import SPECS_VARIABLE, contract
from tests.servers import http_server
from trainway.jobs.runpod import models

KEY = "rpa_CANARY0KEY0OF0THE0ACCOUNT00"
SENT: dict[tuple[str, str], type[models.Sent]] = {
    ("POST", "/pods"): models.CreatePod,
    ("POST", "/pods/ID/action"): models.ActionRequest,
    ("POST", "/clusters"): models.CreateCluster,
    ("POST", "/network-volumes"): models.CreateVolume,
    ("PUT", "/account/ssh-keys"): models.SetKeys,
}
GOT: dict[str, type[BaseModel]] = {
    "GET /pods": models.PodList,
    "POST /pods": models.Pod,
    "GET /pods/ID": models.Pod,
    "POST /pods/ID/action": models.Pod,
    "GET /clusters": models.ClusterList,
    "POST /clusters": models.Cluster,
    "GET /clusters/ID": models.Cluster,
    "GET /clusters/ID/pods": models.PodList,
    "GET /network-volumes": models.VolumeList,
    "POST /network-volumes": models.Volume,
    "GET /network-volumes/ID": models.Volume,
    "GET /account/ssh-keys": models.Keys,
    "PUT /account/ssh-keys": models.Keys,
    "GET /catalog/gpus": models.GpuTypes,
    "GET /catalog/datacenters": models.DataCenters,
    "GET /billing/pods": models.Bill,
    "GET /billing/clusters": models.Bill,
}
ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}
CAPACITY = "There are no longer any instances available with the requested specifications."
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Fault:
    """What goes wrong with one request. status None: the connection is cut. `after`: once it has been done."""

    method: str
    path: str
    status: int | None = None
    detail: str = ""
    errors: list[str] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False


class FakeRunPod:
    """`gpus`: {type id: (price, {data centre: stock})}. `lives`: the states of each pod in turn, as it is looked at."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.url = ""
        self.gpus: dict[str, tuple[float, dict[str, str]]] = {
            "NVIDIA H100 80GB HBM3": (3.99, {"EU-RO-1": "LOW", "US-KS-2": "HIGH"}),
            "NVIDIA A100-SXM4-80GB": (1.79, {"EU-RO-1": "HIGH"}),
        }
        self.volume_centers = {"EU-RO-1", "US-KS-2"}
        self.pods: dict[str, dict[str, Any]] = {}
        self.clusters: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.keys = ["ssh-rsa AAAAB3NzaC1yc2E= somebody@else"]
        self.lives: list[list[str]] = []
        self.surcharge = 1.0
        """What a pod costs, in list prices."""
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.raw = bytearray()
        """All bytes of bodies and addresses that came, and no headers."""
        self.violations: list[str] = []
        self.logs: dict[str, list[tuple[str, str]]] = {}
        """(event id, line) by pod."""
        self.log_cuts: list[int] = []
        """After how many events each connection in turn is cut."""
        self.repeats_moment = False
        """Whether a stream that is resumed begins with the moment it is told, or right after."""
        self.bills: dict[str, list[float]] = {}
        """Dollars by pod or cluster, an hour each."""
        self.log_requests: list[tuple[dict[str, str], str | None]] = []
        self._numbers = iter(range(1, 10_000))
        self._lock = threading.RLock()
        folder = os.environ.get(SPECS_VARIABLE)
        self._contract = contract(Path(folder)) if folder else None

    # for tests

    def fail(self, method: str, path: str, status: int | None = None, detail: str = "", **more: Any) -> None:
        self.faults.append(Fault(method, path, status, detail, **more))

    def alive(self) -> list[dict[str, Any]]:
        """Pods that cost money or disk, those of clusters too."""
        return [pod for pod in self.pods.values() if pod["status"] != "TERMINATED"]

    def asked(self, method: str, path: str) -> list[Any]:
        """The bodies of all such requests, faults included."""
        return [body for m, p, body in self.requests if (m, p) == (method, path)]

    # the API

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any
    ) -> Answer | None:
        with self._lock:
            self.requests.append((method, path, body))
            if headers.get("authorization") != f"Bearer {KEY}":
                return self._checked(method, path, _problem(401, "missing bearer token"))
            if (wrong := self._check_request(method, path, query, headers, body)) is not None:
                return self._checked(method, path, _problem(422, "Request validation failed.", wrong))
            fault = next((f for f in self.faults if (f.method, f.path) == (method, path)), None)
            if fault is not None:
                self.faults.remove(fault)
                if fault.after:
                    self._do(method, path, query, body)
                if fault.status is None:
                    return None
                status, problem, _ = _problem(fault.status, fault.detail, fault.errors)
                return self._checked(method, path, (status, problem, fault.headers))
            return self._checked(method, path, self._do(method, path, query, body))

    def _do(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Answer:
        parts = path.strip("/").split("/")
        match (method, *parts):
            case ("GET", "account", "ssh-keys"):
                return 200, {"keys": list(self.keys)}, {}
            case ("PUT", "account", "ssh-keys"):
                self.keys = list(body["keys"])
                return 200, {"keys": list(self.keys)}, {}
            case ("GET", "catalog", "gpus"):
                return 200, {"gpus": [self._gpu(name, query) for name in self.gpus]}, {}
            case ("GET", "catalog", "datacenters"):
                return 200, {"dataCenters": self._centers()}, {}
            case (_, "pods", *rest):
                return self._pods(method, rest, body)
            case (_, "clusters", *rest):
                return self._clusters(method, rest, body)
            case (_, "network-volumes", *rest):
                return self._volumes(method, rest, body)
            case ("GET", "billing", what):
                return 200, self._bill(what, query), {}
        return _problem(404, "no such thing")

    def _pods(self, method: str, rest: list[str], body: Any) -> Answer:
        if not rest:
            if method == "GET":
                alone = [pod for pod in self.alive() if "cluster" not in pod]
                return 200, {"pods": [self._shown(pod) for pod in alone]}, {}
            gpu = body["gpu"]
            centers = body.get("dataCenterIds") or [None]
            pod = self._new_pod(body, gpu["id"], gpu["count"], centers[0], body.get("cloud", "SECURE"))
            return 201, self._shown(pod), {}
        pod = self.pods.get(rest[0])
        if pod is None or pod["status"] == "TERMINATED":
            return _problem(404, "pod not found")
        if method == "GET":
            life = pod["life"]
            pod["status"] = life.pop(0) if len(life) > 1 else life[0]
            return 200, self._shown(pod), {}
        action = "terminate" if method == "DELETE" else body["action"]
        if "cluster" in pod or action not in ACTIONS[pod["status"]]:
            return _problem(409, f"action {action} is not valid for status {pod['status']}")
        self._set(pod, {"start": "RUNNING", "restart": "RUNNING", "stop": "EXITED"}.get(action, "TERMINATED"))
        return (204, None, {}) if action == "terminate" else (200, self._shown(pod), {})

    def _clusters(self, method: str, rest: list[str], body: Any) -> Answer:
        if not rest and method == "GET":
            return 200, {"clusters": [self._cluster(found) for found in self.clusters.values()]}, {}
        if not rest:
            cluster = {"id": f"cl{next(self._numbers)}", "name": body["name"], "compute": body["compute"]}
            cluster["createdAt"] = _time(self.now())
            shape = body["compute"]
            for rank in range(shape["podCount"]):
                center = (body.get("dataCenterIds") or [None])[0]
                pod = self._new_pod(body, shape["gpuTypeId"], shape["gpuCountPerPod"], center, "SECURE")
                pod["cluster"] = {"id": cluster["id"], "rank": rank}
            self.clusters[cluster["id"]] = cluster
            return 201, self._cluster(cluster), {}
        cluster = self.clusters.get(rest[0], {})
        if not cluster:
            return _problem(404, "cluster not found")
        members = [pod for pod in self.alive() if pod.get("cluster", {}).get("id") == cluster["id"]]
        if method == "DELETE":
            del self.clusters[cluster["id"]]
            for pod in members:
                self._set(pod, "TERMINATED")
            return 204, None, {}
        if rest[1:] == ["pods"]:
            for pod in members:
                pod["status"] = pod["life"].pop(0) if len(pod["life"]) > 1 else pod["life"][0]
            # in no order, as nobody promises one
            return 200, {"pods": [self._shown(pod) for pod in reversed(members)]}, {}
        return 200, self._cluster(cluster), {}

    def _volumes(self, method: str, rest: list[str], body: Any) -> Answer:
        if not rest and method == "GET":
            return 200, {"networkVolumes": list(self.volumes.values())}, {}
        if not rest:
            volume = {"id": f"vol{next(self._numbers)}", "type": "STANDARD", **body}
            self.volumes[volume["id"]] = volume
            return 201, volume, {}
        if rest[0] not in self.volumes:
            return _problem(404, "network volume not found")
        if method == "DELETE":
            del self.volumes[rest[0]]
            return 204, None, {}
        return 200, self.volumes[rest[0]], {}

    # what things look like

    def _new_pod(self, body: Any, gpu: str, count: int, center: str | None, cloud: str) -> dict[str, Any]:
        number = next(self._numbers)
        pod = {
            "id": f"pod{number}", "body": body, "gpu": {"id": gpu, "count": count}, "cloud": cloud, "status": "",
            "center": center or next(iter(self.gpus[gpu][1])), "createdAt": _time(self.now()), "startedAt": None,
            "port": 20_000 + number,
        }  # fmt: skip
        pod["life"] = list(self.lives.pop(0)) if self.lives else ["PROVISIONING", "STARTING", "RUNNING"]
        pod["status"] = pod["life"].pop(0) if len(pod["life"]) > 1 else pod["life"][0]
        self.pods[pod["id"]] = pod
        self.logs.setdefault(pod["id"], [])
        return pod

    def _set(self, pod: dict[str, Any], status: str) -> None:
        if status == "RUNNING":  # the mapping of a restarted container is a new one
            pod["port"] += 1000
        pod["status"], pod["life"] = status, [status]

    def _shown(self, pod: dict[str, Any]) -> dict[str, Any]:
        body, status = pod["body"], pod["status"]
        runs = status == "RUNNING"
        if runs and pod["startedAt"] is None:
            pod["startedAt"] = _time(self.now())
        direct = {
            "host": "127.0.0.1",
            "port": pod["port"],
            "username": "root",
            "command": f"ssh root@127.0.0.1 -p {pod['port']}",
        }
        proxy = {
            "host": "ssh.runpod.io",
            "port": 22,
            "username": pod["id"],
            "command": f"ssh {pod['id']}@ssh.runpod.io",
        }
        price = self.gpus[pod["gpu"]["id"]][0] * pod["gpu"]["count"] * self.surcharge
        found = {
            "id": pod["id"], "name": body["name"], "status": status, "actions": ACTIONS[status], "image": body["image"],
            "args": body.get("args", ""), "disk": body.get("disk", 50), "mounts": body.get("mounts", {}),
            "ports": body.get("ports", []), "env": body.get("env", {}), "registry": body.get("registry"),
            "cloud": pod["cloud"], "dataCenterId": None if status == "PROVISIONING" else pod["center"],
            "cudaVersion": "12.8", "gpu": pod["gpu"], "ssh": {"proxy": proxy if runs else None, "direct": direct if runs else None},
            "template": None, "cost": 0.0 if status in ("EXITED", "TERMINATED") else round(price, 4), "locked": False,
            "runtime": pod.get("runtime", {"uptime": 60, "gpus": [{"util": 0, "memoryUtil": 0}]}) if runs else None,
            "createdAt": pod["createdAt"], "startedAt": pod["startedAt"], "globalNetworking": {"enabled": False},
        }  # fmt: skip
        return {**found, "cluster": pod["cluster"]} if "cluster" in pod else found

    def _cluster(self, cluster: dict[str, Any]) -> dict[str, Any]:
        members = [pod for pod in self.alive() if pod.get("cluster", {}).get("id") == cluster["id"]]
        by_status: dict[str, int] = {}
        for pod in members:
            by_status[pod["status"]] = by_status.get(pod["status"], 0) + 1
        return {**cluster, "type": "TRAINING", "pods": {"total": len(members), "byStatus": by_status}}

    def _gpu(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        price, centers = self.gpus[name]
        found = {
            "id": name, "name": name.removeprefix("NVIDIA "), "pool": None, "manufacturer": "NVIDIA", "memory": 80,
            "secure": True, "community": True, "price": {"secure": price, "community": price},
            "maxCount": {"secure": 8, "community": 8},
        }  # fmt: skip
        if query.get("include") == "AVAILABILITY":
            stock = {center: level for center, level in centers.items() if level != "NONE"}
            order = ["NONE", "LOW", "MEDIUM", "HIGH"]
            found["availability"] = max(stock.values(), key=order.index, default="NONE")
            if stock:
                found["dataCenters"] = [
                    {"id": c, "name": c, "availability": level} for c, level in stock.items()
                ]
        return found

    def _centers(self) -> list[dict[str, Any]]:
        names = sorted({center for _, centers in self.gpus.values() for center in centers})
        return [
            {
                "id": name, "name": name, "region": "EUROPE", "compliance": [], "globalNetwork": True,
                "networkVolumeTypes": ["STANDARD"] if name in self.volume_centers else [],
            }
            for name in names
        ]  # fmt: skip

    def _bill(self, what: str, query: Mapping[str, str]) -> dict[str, Any]:
        name = "podId" if what == "pods" else "clusterId"
        start = datetime.fromisoformat(query["startTime"].replace("Z", "+00:00")).timestamp()
        parts = (
            ("gpuAmount", "cpuAmount", "diskAmount")
            if what == "pods"
            else ("gpuAmount", "diskAmount", "networkingAmount")
        )
        rest = dict.fromkeys(parts[1:], 0.0)
        amounts = self.bills.get(query[name], [])
        records = [
            {"startTime": _time(start + 3600 * hour), "endTime": _time(start + 3600 * (hour + 1)), "totalAmount": amount,
             "gpuAmount": amount, **rest, name: query[name]}
            for hour, amount in enumerate(amounts)
        ]  # fmt: skip
        total = {"totalAmount": sum(amounts), "gpuAmount": sum(amounts), **rest}
        asked = {
            "startTime": query["startTime"],
            "endTime": _time(self.now()),
            "bucketSize": query["bucketSize"],
            name: query[name],
        }
        unique = "uniquePodCount" if what == "pods" else "uniqueClusterCount"
        return {
            "records": records,
            "metadata": {"query": asked, "recordCount": len(records), unique: 1, "totals": total},
        }

    # the judges

    def _check_request(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any
    ) -> list[str] | None:
        wrong: list[str] = []
        model = SENT.get((method, re.sub(r"^/(pods|clusters|network-volumes)/[^/]+", r"/\1/ID", path)))
        if model is not None:
            try:
                model.model_validate(body)
            except ValidationError as error:
                wrong.append(str(error))
        if self._contract is not None:
            wrong += self._contract.check_request(method, path, query, headers, body)
        self.violations += wrong
        return wrong or None

    def _checked(self, method: str, path: str, answer: Answer) -> Answer:
        status, body, _ = answer
        if self._contract is not None:
            self.violations += self._contract.check_answer(method, path, status, body)
        template = re.sub(r"^/(pods|clusters|network-volumes)/[^/]+", r"/\1/ID", path)
        model: type[BaseModel] | None = models.Problem if status >= 400 else GOT.get(f"{method} {template}")
        if body is not None:
            try:
                (model or _missing(method, template)).model_validate_json(json.dumps(body))
            except ValidationError as error:
                self.violations.append(f"our model of {method} {template}: {error}")
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeRunPod

    def _handle(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path).removeprefix("/v2")
        query = dict(urllib.parse.parse_qsl(address.query))
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.raw += self.path.encode() + b"\n" + data + b"\n"
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.command == "GET" and path.endswith("/logs"):
            return self._log(path.split("/")[2], query, headers)
        found = self.fake.answer(self.command, path, query, headers, json.loads(data) if data else None)
        if found is None:
            self._cut()
            return None
        status, body, more = found
        text = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/problem+json" if status >= 400 else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)
        return None

    def _log(self, pod_id: str, query: Mapping[str, str], headers: Mapping[str, str]) -> None:
        fake = self.fake
        fake._check_request("GET", f"/pods/{pod_id}/logs", query, headers, None)
        last = headers.get("last-event-id")
        fake.log_requests.append((dict(query), last))
        pod = fake.pods.get(pod_id)
        fault = next((f for f in fake.faults if f.path == f"/pods/{pod_id}/logs"), None)
        if fault is not None:
            fake.faults.remove(fault)
        if pod is None or pod["status"] == "TERMINATED" or fault is not None:
            status, problem, _ = _problem(
                fault.status or 500 if fault else 404, fault.detail if fault else "pod not found"
            )
            text = json.dumps(problem).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        events = list(fake.logs[pod_id])
        if last is not None:
            events = [
                event for event in events if event[0] > last or (fake.repeats_moment and event[0] == last)
            ]
        elif "tail" in query:
            events = events[len(events) - min(int(query["tail"]), len(events)) :]
        cut = fake.log_cuts.pop(0) if fake.log_cuts else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event_id, line in events if cut is None else events[:cut]:
            moment = {"ts": event_id.split("/")[0], "source": "container", "line": line}
            self._chunk(f"id: {event_id}\ndata: {json.dumps(moment, ensure_ascii=False)}\n\n".encode())
        if cut is None:
            self._chunk(b"")
        else:
            # in the middle of an event
            self._chunk(b'id: 9999\ndata: {"ts": "9999", "li')
            self._cut()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def runpod(now: Callable[[], float]) -> Iterator[FakeRunPod]:
    """The fake, listening on loopback at `url`, until the block ends."""
    fake = FakeRunPod(now)
    handler = type("Handler", (_Handler,), {"fake": fake})
    with http_server(handler) as url:
        fake.url = f"{url}/v2"
        yield fake


def _problem(status: int, detail: str, errors: list[str] | None = None) -> Answer:
    body: dict[str, Any] = {"title": "Problem", "status": status, "detail": detail}
    return status, body | ({"errors": errors} if errors else {}), {}


def _missing(method: str, template: str) -> type[BaseModel]:
    raise AssertionError(f"no model of the answer to {method} {template}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
