"""The verbs against an API that keeps objects: what is there is found, what is asked for happens once."""

from __future__ import annotations

import datetime
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.servers import QuietHandler, http_server
from tests.unit.jobs.kubernetes.material import (
    RUNNING,
    UNSCHEDULABLE,
    ended,
    fake_cluster,
    make_job,
    make_record,
    pod,
    waiting,
)
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs.kubernetes.cluster import Cluster, connect, refusal, right
from trainway.jobs.kubernetes.names import Names
from trainway.jobs.kubernetes.target import KubernetesTarget
from trainway.jobs.record import Record, load_record
from trainway.jobs.target import Job

pytest.importorskip("kmock")

KINDS = ("ConfigMap", "Job", "PersistentVolumeClaim", "Pod", "Service", "StatefulSet", "JobSet")


class World:
    """A cluster, and what happens in it while a verb waits: one event a wait."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.said: list[str] = []
        self.events: list[Callable[[], object]] = []
        self.target = KubernetesTarget(lambda context, namespace: Cluster(cluster.api, namespace), self.wait)

    def wait(self, seconds: float) -> None:
        assert self.events, f"the verb waits for ever; it said {self.said}"
        self.events.pop(0)()

    def up(self, job: Job, record: Record) -> Record:
        return self.target.up(job, record, self.said.append)

    def count(self) -> dict[str, int]:
        return {kind: number for kind in KINDS if (number := len(self.cluster.list(kind)))}

    def make(self, manifest: dict[str, Any]) -> Callable[[], object]:
        return lambda: self.cluster.create(manifest)

    def change(self, kind: str, name: str, **change: Any) -> Callable[[], object]:
        return lambda: self.cluster.patch(kind, name, change)

    def remove(self, kind: str, name: str) -> Callable[[], object]:
        return lambda: self.cluster.delete(kind, name)


@pytest.fixture
def world() -> Iterator[World]:
    with fake_cluster() as (cluster, _):
        yield World(cluster)


def started(world: World, folder: Path, name: str = "cpu", **changes: Any) -> tuple[Job, Record, str]:
    """A job whose pods all run."""
    job = make_job(folder, name, **changes)
    record = make_record(job)
    world.events = [world.make(pod(job, record, index, **RUNNING)) for index in range(job.spec.nodes)]
    return job, world.up(job, record), Names.of(record).base


def warning(name: str, reason: str, message: str) -> dict[str, Any]:
    """An event of what the cluster could not do."""
    return {
        "kind": "Event",
        "metadata": {"name": f"{name}.{reason.lower()}", "namespace": "default"},
        "type": "Warning",
        "involvedObject": {"name": name},
        "reason": reason,
        "message": message,
    }


def condition(name: str) -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": "True", "reason": "R", "message": "m"}]}


def test_up_creates_all_and_tells_why_it_waits(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, gpus=["L40S"])
    record = make_record(job)
    waits, runs = pod(job, record, **UNSCHEDULABLE), pod(job, record, **RUNNING)
    name = waits["metadata"]["name"]
    warning = {
        "kind": "Event",
        "metadata": {"name": "e1", "namespace": "default"},
        "type": "Warning",
        "involvedObject": {"name": name},
        "reason": "FailedMount",
        "message": "volume is busy",
    }
    world.events = [
        world.make(waits),
        world.make(warning),
        lambda: None,
        world.change("Pod", name, status=runs["status"]),
    ]
    found = world.up(job, record)
    assert found.phase == "up"
    assert load_record(job.spec.name) == found
    assert world.count() == {"ConfigMap": 1, "Job": 1, "PersistentVolumeClaim": 1, "Pod": 1, "Service": 1}
    told = [line for line in world.said if line.startswith("waiting:")]
    assert told == [
        f"waiting: {name}: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    ]
    assert f"event: {name}: FailedMount: volume is busy" in world.said
    assert world.said[-1] == "running: 1 of 1 running"


@pytest.mark.parametrize("name", ["cpu", "nodes", "jobset", "statefulset"])
def test_up_again_makes_nothing_twice(world: World, tmp_path: Path, name: str) -> None:
    job, record, _ = started(world, tmp_path, name)
    before = world.count()
    world.said.clear()
    assert world.up(job, record).phase == "up"
    assert world.count() == before
    assert [line for line in world.said if line.startswith("created")] == []


def test_up_goes_on_where_it_broke_off(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = make_record(job)
    first, second, *_ = world.target.request(job, record)
    world.cluster.create(first)
    world.cluster.create({**second, "data": {"orders.json": "old"}})
    world.events = [world.make(pod(job, record, **RUNNING))]
    world.up(job, record)
    settings = world.cluster.read("ConfigMap", second["metadata"]["name"])
    assert settings["data"] == second["data"]
    assert world.count()["PersistentVolumeClaim"] == 1


def test_another_ones_objects_are_left_alone(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = make_record(job)
    claim = world.target.request(job, record)[0]
    claim["metadata"]["labels"] = {"app": "database"}
    world.cluster.create(claim)
    with pytest.raises(ConfigError, match=r"there is another PersistentVolumeClaim trainway-tune-7b"):
        world.up(job, record)
    assert world.count() == {"PersistentVolumeClaim": 1}


def test_the_next_job_of_the_name_finds_the_claim(world: World, tmp_path: Path) -> None:
    job, record, _ = started(world, tmp_path)
    name = pod(job, record)["metadata"]["name"]
    world.events = [world.remove("Pod", name)]
    world.target.down(record, world.said.append)
    later = make_record(job, token="11111111")
    world.events = [world.make(pod(job, later, **RUNNING))]
    world.up(job, later)
    assert world.count()["PersistentVolumeClaim"] == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (waiting("CreateContainerConfigError", 'secret "hub" not found'), 'secret "hub" not found'),
        (waiting("InvalidImageName", "bad"), "InvalidImageName"),
    ],
)
def test_what_no_waiting_cures_ends_it(world: World, tmp_path: Path, status: Any, message: str) -> None:
    job = make_job(tmp_path)
    record = make_record(job)
    world.events = [world.make(pod(job, record, **status))]
    with pytest.raises(EnvironmentFault) as caught:
        world.up(job, record)
    assert message in caught.value.why
    assert load_record(job.spec.name).phase == "up"  # it is there, and `down` ends it


def test_a_job_that_fails_at_once_is_an_error(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = make_record(job)
    name = Names.of(record).base
    world.events = [
        world.make(pod(job, record, **ended(2, reason="Error", message="error: no such file"))),
        world.change("Job", name, status=condition("Failed")),
    ]
    with pytest.raises(EnvironmentFault) as caught:
        world.up(job, record)
    assert "exit code 2 (the configuration is wrong): error: no such file" in caught.value.why


def test_a_failed_job_is_replaced_and_a_finished_one_is_not(world: World, tmp_path: Path) -> None:
    job, record, name = started(world, tmp_path)
    world.cluster.patch("Job", name, {"status": condition("Failed")})
    world.up(job, record)
    assert "status" not in world.cluster.read("Job", name)  # a new one
    world.cluster.patch("Job", name, {"status": condition("Complete")})
    world.said.clear()
    world.up(job, record)
    assert world.said == ["complete: every node has ended well"]
    assert "status" in world.cluster.read("Job", name)


def test_stop_suspends_and_up_goes_on(world: World, tmp_path: Path) -> None:
    job, record, name = started(world, tmp_path)
    pod_name = pod(job, record)["metadata"]["name"]
    world.events = [world.remove("Pod", pod_name)]
    stopped = world.target.stop(record, world.said.append)
    assert stopped.phase == "stopped" and not world.events
    assert world.cluster.read("Job", name)["spec"]["suspend"] is True
    assert world.target.status(stopped).machine == "stopped"
    world.events = [world.make(pod(job, record, **RUNNING))]
    assert world.up(job, stopped).phase == "up"
    assert world.cluster.read("Job", name)["spec"]["suspend"] is False
    assert f"resumed: Job {name}" in world.said


def test_a_statefulset_is_stopped_by_its_replicas(world: World, tmp_path: Path) -> None:
    job, record, name = started(world, tmp_path, "statefulset")
    world.events = [world.remove("Pod", pod(job, record)["metadata"]["name"])]
    world.target.stop(record, world.said.append)
    assert world.cluster.read("StatefulSet", name)["spec"]["replicas"] == 0
    world.events = [world.make(pod(job, record, **RUNNING))]
    world.up(job, record)
    assert world.cluster.read("StatefulSet", name)["spec"]["replicas"] == 1


def test_a_queue_lets_jobs_go_and_keeps_no_stopped_one(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "queue")
    record = make_record(job)
    name = Names.of(record).base
    runs = [world.make(pod(job, record, index, **RUNNING)) for index in range(2)]

    def admitted() -> None:
        assert world.cluster.read("Job", name)["spec"]["suspend"] is True  # not let go by us
        world.cluster.patch("Job", name, {"spec": {"suspend": False}})

    world.events = [admitted, *runs]
    world.up(job, record)
    record = load_record(job.spec.name)
    world.events = [world.remove("Pod", pod(job, record, index)["metadata"]["name"]) for index in range(2)]
    stopped = world.target.stop(record, world.said.append)
    assert world.cluster.find("Job", name) is None
    assert world.target.status(stopped).machine == "stopped"
    world.events = [admitted, *runs]
    world.up(job, record)
    assert world.cluster.find("Job", name) is not None


def test_what_has_ended_cannot_be_stopped(world: World, tmp_path: Path) -> None:
    _, record, name = started(world, tmp_path)
    world.cluster.patch("Job", name, {"status": condition("Complete")})
    with pytest.raises(ConfigError, match="does not run"):
        world.target.stop(record, world.said.append)


@pytest.mark.parametrize("name", ["cpu", "jobset", "statefulset"])
def test_down_leaves_the_volume_alone_and_can_be_said_twice(world: World, tmp_path: Path, name: str) -> None:
    job, record, _ = started(world, tmp_path, name)
    world.events = [world.remove("Pod", pod(job, record)["metadata"]["name"])]
    gone = world.target.down(record, world.said.append)
    assert gone.phase == "ended" and gone.ended is not None
    assert world.count() == {"PersistentVolumeClaim": 1}
    assert "the claim trainway-tune-7b in default stays" in world.said[-1]
    assert world.target.down(gone, world.said.append).phase == "ended"
    assert world.target.status(gone).machine == "gone"


def test_status_names_the_trouble_of_each_node(world: World, tmp_path: Path) -> None:
    job, record, _ = started(world, tmp_path, "nodes")
    assert world.target.status(record).machine == "running"
    names = [pod(job, record, index)["metadata"]["name"] for index in range(4)]
    world.cluster.patch("Pod", names[1], {"status": ended(137, reason="OOMKilled")})
    world.cluster.patch("Pod", names[2], {"status": waiting("ImagePullBackOff", "no such tag")})
    found = world.target.status(record)
    assert found.machine == "starting"
    assert found.detail == "2 of 4 running; exit code 137 (OOMKilled); ImagePullBackOff: no such tag"
    assert found.nodes[1] == "node 1: Failed: exit code 137 (OOMKilled)"
    assert len(found.nodes) == 4
    assert found.pod is None  # nobody could be asked


def test_tokenising_comes_before_any_gpu(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "prepare")
    record = make_record(job)
    names = Names.of(record)

    def halfway() -> None:
        assert world.cluster.find("Job", names.base) is None
        held = load_record(job.spec.name)
        assert world.target.status(held).detail == "tokenising: 0 of 4 running; ImagePullBackOff"

    world.events = [
        world.make(pod(job, record, role="prepare", **waiting("ImagePullBackOff"))),
        halfway,
        world.change("Job", names.prepare, status=condition("Complete")),
        world.make(pod(job, record, **RUNNING)),
    ]
    world.up(job, record)
    assert f"tokenised: {names.prepare}" in world.said
    assert world.count()["Job"] == 2
    # a job that runs has its data: its pods may hold the volume
    world.cluster.delete("Job", names.prepare)
    world.up(job, load_record(job.spec.name))
    assert world.count()["Job"] == 1


def test_a_failed_preparation_starts_no_training(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "prepare")
    record = make_record(job)
    names = Names.of(record)
    bad = ended(3, reason="Error", message="error: corpus.jsonl:7: not JSON")
    world.events = [
        world.make(pod(job, record, 2, role="prepare", **bad)),
        world.change("Job", names.prepare, status=condition("Failed")),
    ]
    with pytest.raises(DataError, match=r"exit code 3 .*corpus.jsonl:7: not JSON"):
        world.up(job, record)
    assert world.cluster.find("Job", names.base) is None
    # and again: the failed one is replaced
    world.events = [
        world.change("Job", names.prepare, status=condition("Complete")),
        world.make(pod(job, record, **RUNNING)),
    ]
    assert world.up(job, record).phase == "up"


def test_a_path_that_is_not_here_makes_no_pod(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "upload", upload=["gone.jsonl"])
    with pytest.raises(ConfigError, match=r"there is no .*gone\.jsonl"):
        world.up(job, make_record(job))
    assert "Pod" not in world.count()


def test_strays_are_those_that_nobody_needs(world: World, tmp_path: Path) -> None:
    _, record, name = started(world, tmp_path, "infiniband")
    other = make_job(tmp_path, name="cpu")
    lost = make_record(other, token="deadbeef")
    for manifest in world.target.request(other, lost):
        if manifest["kind"] == "Job":
            manifest["metadata"]["annotations"] = {"trainway/dollars-per-hour": "20.0"}
            world.cluster.create(manifest)
    found = world.target.strays([record])
    assert [(stray.name, stray.dollars_per_hour, stray.why) for stray in found] == [
        (Names.of(lost).base, 20.0, "no job of this machine is called so")
    ]
    world.target.end_stray(found[0])
    assert world.target.strays([record]) == []
    over = replace(record, phase="ended")
    assert [stray.name for stray in world.target.strays([over])] == [name]  # not its pods beside it
    world.cluster.patch("Job", name, {"status": condition("Complete")})
    assert world.target.strays([over]) == []


def test_what_is_past_its_deadline_is_a_stray(world: World, tmp_path: Path) -> None:
    _, record, name = started(world, tmp_path)
    began = {"status": {"startTime": "2026-01-01T00:00:00Z"}}
    world.cluster.patch("Job", name, began)
    assert world.target.strays([record]) == []  # no deadline is known
    bounded = replace(record, limit_hours=4.0)
    (stray,) = world.target.strays([bounded])
    assert stray.why.startswith("its deadline was ") and stray.id == f"|default|Job|{name}"
    world.cluster.patch("Job", name, {"spec": {"suspend": True}})
    assert world.target.strays([bounded]) == []  # it holds no machine
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    world.cluster.patch("Job", name, {"spec": {"suspend": False}, "status": {"startTime": now}})
    assert world.target.strays([bounded]) == []


def test_a_preparation_can_be_stopped(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "prepare")
    record = make_record(job)
    names = Names.of(record)
    worker = pod(job, record, role="prepare", **RUNNING)

    def leave() -> None:
        raise KeyboardInterrupt

    world.events = [world.make(worker), leave]
    with pytest.raises(KeyboardInterrupt):
        world.up(job, record)
    record = load_record(job.spec.name)
    assert record.phase == "asked"
    world.events = [world.remove("Pod", worker["metadata"]["name"])]
    assert world.target.stop(record, world.said.append).phase == "stopped"
    assert world.cluster.find("Job", names.prepare) is None


def test_cost_is_the_clock_times_the_price(world: World, tmp_path: Path) -> None:
    job, record, name = started(world, tmp_path)
    began = record.place["since"]
    assert world.target.cost(record).note == "no price is known: set `price` of the GPU in the job file"
    paid = replace(record, dollars_per_hour=4.0)
    world.cluster.patch(
        "Job", name, {"status": {"startTime": clock(began), "completionTime": clock(began + 9000)}}
    )
    assert world.target.cost(paid).hours == pytest.approx(2.5, abs=1e-3)
    assert world.target.cost(paid).estimated == pytest.approx(10.0, abs=1e-2)
    # the hours before a stop count, those between a stop and the next `up` do not
    world.events = [world.remove("Pod", pod(job, record)["metadata"]["name"])]
    stopped = world.target.stop(paid, world.said.append)
    assert world.target.cost(stopped).hours == pytest.approx(2.5, abs=1e-3)
    world.events = [world.make(pod(job, record, **RUNNING))]
    world.cluster.patch("Job", name, {"status": {"startTime": None, "completionTime": None}})
    again = world.up(job, stopped)
    later = again.place["since"]
    world.cluster.patch(
        "Job", name, {"status": {"startTime": clock(later), "completionTime": clock(later + 3600)}}
    )
    assert world.target.cost(again).hours == pytest.approx(3.5, abs=1e-3)
    world.events = [world.remove("Pod", pod(job, record)["metadata"]["name"])]
    assert world.target.cost(world.target.down(again, world.said.append)).hours == pytest.approx(
        3.5, abs=1e-3
    )


def clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def test_a_cluster_without_jobsets_says_so(tmp_path: Path) -> None:
    with fake_cluster() as (cluster, handler):
        import kmock

        handler["post", kmock.resource("jobset.x-k8s.io/v1alpha2/jobsets")] << kmock.KubernetesNotFoundError
        world = World(cluster)
        job = make_job(tmp_path, "jobset")
        with pytest.raises(EnvironmentFault, match="the cluster knows no JobSet"):
            world.up(job, make_record(job))


def test_before_anything_was_sent_there_is_nothing(world: World, tmp_path: Path) -> None:
    record = make_record(make_job(tmp_path))
    with pytest.raises(ConfigError, match="was never sent to a cluster"):
        world.target.status(record)
    assert world.target.down(record, world.said.append).phase == "ended"


def test_a_cluster_that_does_not_answer() -> None:
    from kubernetes import client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = client.Configuration(host=f"http://127.0.0.1:{port}")
    settings.retries = False
    cluster = Cluster(client.ApiClient(settings), "default")
    with pytest.raises(EnvironmentFault, match="does not answer"):
        cluster.read("Job", "x")


def test_the_kubeconfig_says_where_and_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Handler(QuietHandler):
        def answer(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.reply(403, b'{"message": "pods is forbidden"}')

    with http_server(Handler) as url:
        config = {
            "current-context": "first",
            "clusters": [
                {"name": "nowhere", "cluster": {"server": "http://127.0.0.1:1"}},
                {"name": "here", "cluster": {"server": url}},
            ],
            "users": [{"name": "me", "user": {"token": "canary-0123456789"}}],
            "contexts": [
                {"name": "first", "context": {"cluster": "nowhere", "user": "me"}},
                {"name": "second", "context": {"cluster": "here", "user": "me"}},
            ],
        }
        path = tmp_path / "config"
        path.write_text(json.dumps(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        with pytest.raises(EnvironmentFault) as caught:
            connect("second", "team").read("Pod", "p")
    assert asked == [("/api/v1/namespaces/team/pods/p", "Bearer canary-0123456789")]
    assert "pods is forbidden" in caught.value.why
    assert "canary" not in str(caught.value)


def test_no_kubeconfig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for context in (None, "other"):
        with pytest.raises(EnvironmentFault, match="no cluster is known"):
            connect(context, "default")


@pytest.mark.parametrize(
    ("status", "kind", "fix"),
    [
        (401, EnvironmentFault, "log in again"),
        (403, EnvironmentFault, "ask for the right to create jobs.batch"),
        (422, ConfigError, "correct the job file"),
        (500, EnvironmentFault, "try again"),
    ],
)
def test_refusals_say_what_to_do(status: int, kind: type[Exception], fix: str) -> None:
    error = refusal("POST", "/apis/batch/v1/jobs", status, json.dumps({"message": "why"}).encode())
    assert type(error) is kind
    assert "why" in str(error) and fix in str(error)


def test_hostile_names_stay_in_the_path(world: World) -> None:
    assert world.cluster.find("Pod", "../../secrets/hub;$(touch x)") is None


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("GET", "/api/v1/namespaces/training/pods", "list pods in training"),
        ("GET", "/api/v1/namespaces/training/pods/p-0", "get pods in training"),
        ("GET", "/api/v1/namespaces/training/pods/p-0/log", "get pods/log in training"),
        ("POST", "/apis/batch/v1/namespaces/training/jobs", "create jobs.batch in training"),
        ("PATCH", "/apis/apps/v1/namespaces/a/statefulsets/x", "patch statefulsets.apps in a"),
        (
            "DELETE",
            "/apis/jobset.x-k8s.io/v1alpha2/namespaces/a/jobsets/x",
            "delete jobsets.jobset.x-k8s.io in a",
        ),
        ("GET", "/apis/batch/v1/jobs", "list jobs.batch in all namespaces"),
    ],
)
def test_a_right_that_is_missing_is_named(method: str, path: str, said: str) -> None:
    assert right(method, path) == said
    assert f"ask for the right to {said} " in refusal(method, path, 403, b"").fix  # type: ignore[attr-defined]


def test_pods_that_do_not_come_are_left_and_told(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, gpus=["L40S"], limits={"hours": 4, "start_minutes": 2})
    record = make_record(job)
    now = [1000.0]
    world.target._now = lambda: now[0]

    def pass_time() -> None:
        now[0] += 61

    world.events = [
        world.make(pod(job, record, **UNSCHEDULABLE)), pass_time,
        world.make(warning(f"{Names.of(record).base}-train-0", "FailedScheduling", "0/3 nodes")), pass_time,
    ]  # fmt: skip
    with pytest.raises(EnvironmentFault, match="has not come within 2 minutes") as caught:
        world.up(job, record)
    assert (
        "Insufficient nvidia.com/gpu" in caught.value.why
        and "FailedScheduling: 0/3 nodes" in caught.value.why
    )
    assert "trainway down tune-7b" in caught.value.fix
    assert world.count()["Job"] == 1 and world.count()["Pod"] == 1
    assert any("1 of 2 minutes" in line for line in world.said)
    # the cluster finds room after all
    world.events = [world.change("Pod", f"{Names.of(record).base}-train-0", status=RUNNING)]
    assert world.up(job, load_record(job.spec.name)).phase == "up"


def test_an_upload_pod_that_does_not_come_is_ended(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path, "upload", limits={"hours": 4, "start_minutes": 1})
    record = make_record(job)
    now = [1000.0]
    world.target._now = lambda: now[0]
    world.events = [lambda: now.__setitem__(0, now[0] + 61)]
    with pytest.raises(EnvironmentFault, match="has not come within 1 minutes"):
        world.up(job, record)
    assert world.count() == {"ConfigMap": 1, "PersistentVolumeClaim": 1, "Service": 1}


def test_a_quota_that_refuses_the_pods_is_told_of_their_job(world: World, tmp_path: Path) -> None:
    """Where no pod is made there is none to be asked: the cluster tells it of the Job."""
    job = make_job(tmp_path)
    record = make_record(job)
    base = Names.of(record).base
    over = "pods is forbidden: exceeded quota: gpus, requested: 1, used: 8, limited: 8"
    world.events = [
        world.make(warning(base, "FailedCreate", over)),
        world.make(warning(f"{base}x", "FailedCreate", f"{base}x: must specify limits.cpu for: trainway")),
    ]
    with pytest.raises(EnvironmentFault, match="makes no pod") as caught:
        world.up(job, record)
    assert any(over in line for line in world.said) and "must specify limits.cpu" in caught.value.why


def test_what_was_refused_before_is_not_taken_for_now(world: World, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    record = make_record(job)
    base = Names.of(record).base
    world.cluster.create(warning(base, "FailedCreate", "violates PodSecurity"))
    world.events = [lambda: None, world.make(pod(job, record, **RUNNING))]
    assert world.up(job, record).phase == "up"


def test_a_second_job_of_the_name_does_not_write_to_the_claim(world: World, tmp_path: Path) -> None:
    job, _, base = started(world, tmp_path)
    with pytest.raises(ConfigError, match="another job called tune-7b") as caught:
        world.up(job, make_record(job, "feedf00d"))
    assert base in caught.value.what and world.count()["Job"] == 1
    world.cluster.patch("Job", base, {"status": condition("Complete")})
    other = make_record(job, "feedf00d")
    world.events = [world.make(pod(job, other, **RUNNING))]
    assert world.up(job, other).phase == "up"


def test_a_job_that_is_there_says_what_it_was_made_with(world: World, tmp_path: Path) -> None:
    _, record, _ = started(world, tmp_path)
    job = make_job(tmp_path, image="registry.example/trainway:0.2")
    world.up(job, record)
    assert any("as it was made, with image registry.example/trainway:0.1" in line for line in world.said)


def test_down_waits_for_all_that_it_deletes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, record, base = started(world, tmp_path)
    delete = Cluster.delete

    def held(cluster: Cluster, kind: str, name: str) -> bool:
        return True if kind == "Service" else delete(cluster, kind, name)  # a finalizer holds it

    monkeypatch.setattr(Cluster, "delete", held)
    world.events = [
        lambda: delete(world.cluster, "Pod", f"{base}-train-0"),
        lambda: delete(world.cluster, "Service", base),
    ]
    assert world.target.down(record, world.said.append).phase == "ended"
    assert world.events == [] and world.count() == {"PersistentVolumeClaim": 1}


def test_what_others_have_made_is_no_stray(world: World, tmp_path: Path) -> None:
    _, record, base = started(world, tmp_path)
    (stray,) = world.target.strays([])
    assert stray.name == base and stray.why == "no job of this machine is called so"
    for mark in ("0123456789abcdef", None):  # of another machine's Trainway; of nobody knows whom
        world.cluster.patch("Job", base, {"metadata": {"labels": {"trainway/origin": mark}}})
        assert world.target.strays([]) == []
    assert world.target.strays([replace(record, phase="ended")])[0].why == "its job has ended"
