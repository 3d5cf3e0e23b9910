"""Renting: candidates in their order, none too dear, one machine whatever happens on the way, nothing left over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_runpod import CAPACITY, FakeRunPod
from tests.unit.jobs.runpod.conftest import A100, H100, HOST_KEY, FakeShells, Time, make_job, make_record
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.record import find_record
from trainway.jobs.runpod.api import Lost, Refused
from trainway.jobs.runpod.bootstrap import KEY_MARK
from trainway.jobs.runpod.target import RunPodTarget

TWO = [{"name": "H100 SXM"}, {"name": "A100 80GB", "count": 2}]
NO_VOLUME: dict[str, Any] = {"volume": {}, "sync": "s3://bucket/runs"}


def ids(fake: FakeRunPod) -> list[str]:
    return [body["gpu"]["id"] for body in fake.asked("POST", "/pods")]


def test_up_from_nothing(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "corpus.jsonl").write_text("{}\n")
    job = make_job(tmp_path, upload=["corpus.jsonl", {"path": "corpus.jsonl", "to": "data/b.jsonl"}])
    record = target.up(job, make_record(job), said.append)
    assert find_record("tune") == record and record.phase == "up"
    (pod,) = fake.alive()
    assert pod["body"]["name"] == record.remote_name and record.place["id"] == pod["id"]
    # where the most of them are, with a volume of its own there
    (volume,) = fake.volumes.values()
    assert (volume["name"], volume["size"], volume["dataCenter"]) == (record.remote_name, 100, "US-KS-2")
    assert pod["body"]["dataCenterIds"] == ["US-KS-2"]
    assert pod["body"]["mounts"] == {"network": [{"volumeId": volume["id"], "path": "/workspace"}]}
    assert pod["body"]["ports"] == ["22/tcp"] and pod["body"]["startSsh"] is True
    assert record.dollars_per_hour == 3.99 and record.num_gpus == 1
    assert [request[:2] for request in fake.requests if request[0] != "GET"] == [
        ("PUT", "/account/ssh-keys"), ("POST", "/network-volumes"), ("POST", "/pods"),
    ]  # fmt: skip
    assert shells.inside.uploads == {
        "/workspace/corpus.jsonl": tmp_path / "corpus.jsonl",
        "/workspace/data/b.jsonl": tmp_path / "corpus.jsonl",
    }
    assert "/workspace/jobs/tune/uploaded" in shells.inside.written
    assert time_.slept == [5.0, 5.0]  # PROVISIONING, STARTING


def test_the_key_joins_those_of_the_account(
    target: RunPodTarget, fake: FakeRunPod, home: Path, tmp_path: Path, said: list[str]
) -> None:
    shutil.rmtree(home / "ssh")  # it is made here
    before = list(fake.keys)
    job = make_job(tmp_path)
    record = target.up(job, make_record(job), said.append)
    ours = Path(f"{record.place['ssh_key']}.pub").read_text().strip()
    assert fake.keys == [*before, ours]
    assert Path(record.place["ssh_key"]).stat().st_mode & 0o777 == 0o600
    target.up(job, record, said.append)
    assert len(fake.asked("PUT", "/account/ssh-keys")) == 1 and len(fake.alive()) == 1


def test_an_account_key_that_cannot_be_sent_back_is_not_lost(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.keys = ["not a key at all"]
    job = make_job(tmp_path)
    with pytest.raises(EnvironmentFault, match="not registered"):
        target.up(job, make_record(job), said.append)
    assert fake.keys == ["not a key at all"] and fake.pods == {}


def test_no_capacity_then_the_second_candidate(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.fail("POST", "/pods", 400, CAPACITY)
    job = make_job(tmp_path, gpus=TWO, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    assert ids(fake) == [H100, A100] and len(fake.alive()) == 1
    assert record.gpu == "A100 80GB" and record.num_gpus == 2
    assert record.dollars_per_hour == pytest.approx(2 * 1.79)
    # the machine ends itself by its own price, not by the first candidate's
    assert '"dollars_per_hour":3.58,' in fake.asked("POST", "/pods")[1]["env"]["TRAINWAY_ORDERS"]
    assert any("none to be had" in line and CAPACITY in line for line in said)


def test_each_data_centre_and_no_empty_volume(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    """The H100 is in two data centres, none of which has one after all: no volume is left there."""
    fake.fail("POST", "/pods", 400, CAPACITY)
    fake.fail("POST", "/pods", 400, CAPACITY)
    job = make_job(tmp_path, gpus=TWO)
    target.up(job, make_record(job), said.append)
    asked = [(body["gpu"]["id"], body["dataCenterIds"]) for body in fake.asked("POST", "/pods")]
    assert asked == [(H100, ["US-KS-2"]), (H100, ["EU-RO-1"]), (A100, ["EU-RO-1"])]
    assert [volume["dataCenter"] for volume in fake.volumes.values()] == ["EU-RO-1"]
    assert len(fake.asked("POST", "/network-volumes")) == 2


def test_403_skips_and_all_refused_says_why(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.fail("POST", "/pods", 403, "pool is private")
    fake.fail("POST", "/pods", 400, CAPACITY)
    job = make_job(tmp_path, gpus=TWO, **NO_VOLUME)
    with pytest.raises(EnvironmentFault, match="no candidate") as caught:
        target.up(job, make_record(job), said.append)
    assert caught.value.code == 4 and "pool is private" in caught.value.why and CAPACITY in caught.value.why
    assert ids(fake) == [H100, A100] and fake.alive() == []


def test_a_rule_broken_by_every_candidate_is_the_job_s_own(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    for _ in range(2):
        fake.fail("POST", "/pods", 400, "registry credential not found")
    job = make_job(tmp_path, gpus=TWO, **NO_VOLUME)
    with pytest.raises(ConfigError) as caught:
        target.up(job, make_record(job), said.append)
    assert caught.value.why == "registry credential not found" and len(ids(fake)) == 2


@pytest.mark.parametrize(("status", "code"), [(402, 4), (422, 2), (401, 4)])
def test_what_no_candidate_would_change_stops_at_once(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], status: int, code: int
) -> None:
    fake.fail("POST", "/pods", status, "insufficient balance")
    job = make_job(tmp_path, gpus=TWO)
    with pytest.raises(Refused, match="does not make a pod") as caught:
        target.up(job, make_record(job), said.append)
    assert caught.value.code == code and "insufficient balance" in caught.value.why
    assert ids(fake) == [H100] and fake.alive() == [] and fake.volumes == {}


def test_what_is_not_worth_asking_for(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.gpus[A100] = (1.79, {"EU-RO-1": "NONE"})
    gpus = [
        {"name": "H100 SXM", "max_price": 3.5}, {"name": "H100 SXM", "count": 9}, {"name": "H200"},
        {"name": "A100 80GB"}, {"name": "H100 SXM", "max_price": 3.99},
    ]  # fmt: skip
    job = make_job(tmp_path, gpus=gpus, **NO_VOLUME)
    target.up(job, make_record(job), said.append)
    assert ids(fake) == [H100]
    assert [line.partition(": ")[2] for line in said if "H100" in line or "A100" in line or "H200" in line][
        :4
    ] == [
        "$3.99 an hour each, and the highest allowed is $3.50",
        "a machine has at most 8 of them",
        "RunPod's catalogue does not list it",
        "none in stock",
    ]


def test_the_limit_in_dollars_is_a_highest_price(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, gpus=[{"name": "H100 SXM", "count": 2}], limits={"dollars": 30.0}, **NO_VOLUME)
    with pytest.raises(EnvironmentFault, match="no candidate") as caught:
        target.up(job, make_record(job, planned_hours=5.0), said.append)
    assert "the highest allowed is $3.00" in caught.value.why and ids(fake) == []


def test_a_pod_dearer_than_allowed_is_given_back(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.surcharge = 1.5
    gpus = [{"name": "H100 SXM", "max_price": 4}, {"name": "A100 80GB", "max_price": 1.8}]
    job = make_job(tmp_path, gpus=gpus, **NO_VOLUME)
    with pytest.raises(EnvironmentFault, match="no candidate"):
        target.up(job, make_record(job), said.append)
    assert ids(fake) == [H100, A100] and fake.alive() == []
    assert any("the most allowed is $4.20" in line for line in said)


def test_a_pod_that_got_dearer_is_told_its_real_price(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    """It ends itself when its dollars are spent: by the price in its orders, which are made before it is."""
    fake.surcharge = 1.5
    job = make_job(tmp_path, gpus=[{"name": "A100 80GB", "count": 2}], **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    first, second = fake.asked("POST", "/pods")
    assert '"dollars_per_hour":3.58,' in first["env"]["TRAINWAY_ORDERS"]
    assert '"dollars_per_hour":5.37,' in second["env"]["TRAINWAY_ORDERS"]
    assert len(fake.alive()) == 1 and record.dollars_per_hour == pytest.approx(5.37)
    assert [span["dollars_per_hour"] for span in record.place["spans"]] == pytest.approx([3.58, 5.37])


def test_what_a_pod_costs_with_its_disk_is_what_is_counted(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.surcharge = 1.02
    job = make_job(tmp_path, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    assert len(ids(fake)) == 1 and record.dollars_per_hour == pytest.approx(4.0698)
    assert record.place["spans"][0]["dollars_per_hour"] == pytest.approx(4.0698)


@pytest.mark.parametrize("status", [None, 502])
def test_a_lost_answer_to_create_makes_no_second_pod(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str], status: int | None
) -> None:
    fake.fail("POST", "/pods", status, after=True)
    job = make_job(tmp_path, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    assert len(ids(fake)) == 1 and len(fake.pods) == 1 and record.place["id"] in fake.pods
    assert time_.slept[0] == 1.0  # then the list was looked at


@pytest.mark.parametrize("status", [None, 502])
def test_a_create_that_did_nothing_is_asked_again(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], status: int | None
) -> None:
    fake.fail("POST", "/pods", status)
    fake.fail("POST", "/pods", status)
    job = make_job(tmp_path, **NO_VOLUME)
    target.up(job, make_record(job), said.append)
    assert len(ids(fake)) == 3 and len(fake.pods) == 1


def test_when_nobody_knows_the_next_up_finds_it(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    """The network dies right after the pod was made, and this program with it."""
    fake.fail("POST", "/pods", None, after=True)
    job = make_job(tmp_path, **NO_VOLUME)
    record = make_record(job)
    fake.fail("GET", "/pods", 403, "gone mad")  # of `only_machine`, first of all
    with pytest.raises(Refused):
        target.up(job, record, said.append)
    assert fake.pods == {}
    for _ in range(5):
        fake.fail("GET", "/pods", 503)
    with pytest.raises(Lost):
        target.up(job, record, said.append)
    fake.faults.clear()
    fake.fail("POST", "/pods", None, after=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainway.jobs.runpod.placing.only_machine", _dies_the_second_time())
        with pytest.raises(KeyboardInterrupt):
            target.up(job, find_record("tune") or record, said.append)
    found = find_record("tune")
    assert found is not None and found.phase == "asked" and "id" not in found.place and len(fake.pods) == 1
    record = target.up(job, found, said.append)
    assert len(ids(fake)) == 1 and len(fake.pods) == 1 and record.phase == "up"


def _dies_the_second_time() -> Any:
    from trainway.jobs.runpod.machines import only_machine

    calls = 0

    def look(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return only_machine(*arguments)

    return look


def test_a_second_pod_of_the_same_name_is_ended(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    body = fake.asked("POST", "/pods")[0]
    fake._new_pod(body, H100, 1, None, "SECURE")
    again = target.up(job, record, said.append)
    assert [pod["id"] for pod in fake.alive()] == [record.place["id"]] == [again.place["id"]]


def test_a_pod_in_error_is_ended_and_the_next_candidate_asked(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.lives = [["PROVISIONING", "STARTING", "ERROR"]]
    job = make_job(tmp_path, gpus=TWO, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    assert ids(fake) == [H100, A100] and [pod["gpu"]["id"] for pod in fake.alive()] == [A100]
    assert len(record.place["spans"]) == 2 and record.place["spans"][0]["end"] is not None


def test_a_pod_that_never_runs_is_ended(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    fake.lives = [["STARTING"], ["STARTING"]]
    job = make_job(tmp_path, limits={"start_minutes": 2.0})
    began = time_.now
    with pytest.raises(EnvironmentFault, match="no candidate") as caught:
        target.up(job, make_record(job), said.append)
    # one for each data centre
    assert caught.value.why.count("still STARTING after 2 minutes (limits.start_minutes)") == 2
    assert len(fake.pods) == 2 and fake.alive() == [] and fake.volumes == {}
    assert any(line.startswith("waiting for pod pod") and "1 of 2 minutes" in line for line in said)
    assert time_.slept.count(5.0) == 2 * 24 and time_.now - began >= 240


def test_a_pod_that_vanishes_while_it_starts(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.lives = [["PROVISIONING", "TERMINATED"]]
    job = make_job(tmp_path, gpus=TWO, **NO_VOLUME)
    target.up(job, make_record(job), said.append)
    assert ids(fake) == [H100, A100] and len(fake.alive()) == 1


def test_an_existing_volume_says_where(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.volumes["v1"] = {
        "id": "v1",
        "name": "mine",
        "size": 500,
        "dataCenter": "EU-RO-1",
        "type": "STANDARD",
    }
    job = make_job(tmp_path, volume={"id": "v1"})
    target.up(job, make_record(job), said.append)
    assert fake.asked("POST", "/pods")[0]["dataCenterIds"] == ["EU-RO-1"]
    assert fake.asked("POST", "/network-volumes") == []
    with pytest.raises(ConfigError, match="no network volume 'v2'") as caught:
        job = make_job(tmp_path, volume={"id": "v2"})
        target.up(job, make_record(job), said.append)
    assert "v1 (mine)" in caught.value.why


def test_a_lost_answer_makes_no_second_volume(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.fail("POST", "/network-volumes", None, after=True)
    job = make_job(tmp_path)
    target.up(job, make_record(job), said.append)
    assert len(fake.volumes) == 1 and len(fake.asked("POST", "/network-volumes")) == 1


def test_the_host_key_comes_from_the_provider_s_log(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, **NO_VOLUME)
    told = HOST_KEY.replace("AAAAIJ8m", "AAAAIDIF")
    lines = [("2027-01-15T08:00:00Z/1", KEY_MARK + HOST_KEY), ("2027-01-15T08:00:01Z/2", KEY_MARK + told)]
    fake.logs["pod1"] = lines  # the first start's, then the second's
    record = target.up(job, make_record(job), said.append)
    assert shells.addresses[0]["host_key"] == told and shells.scans == []
    first_port = shells.addresses[0]["port"]
    # another start of the container: another port and, on the erased disk, another key
    fake._set(fake.pods["pod1"], "RUNNING")
    fake.pods["pod1"]["startedAt"] = "2027-01-15T09:00:00Z"
    lines.append(("2027-01-15T09:00:00Z/3", KEY_MARK + HOST_KEY))
    assert target.ssh(record, ["nvidia-smi"]) == 7
    assert shells.addresses[-1]["port"] == first_port + 1000 and shells.addresses[-1]["host_key"] == HOST_KEY


def test_a_key_that_is_only_shown_is_pinned_once(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, **NO_VOLUME)
    shells.unreachable = 2
    record = target.up(job, make_record(job), said.append)
    target.tunnel(record, {6006: 6006}, said.append)
    assert len(shells.scans) >= 1 and {address["host_key"] for address in shells.addresses} == {HOST_KEY}
    found = find_record("tune")
    assert found is not None
    scans = len(shells.scans)
    target.ssh(found, [])
    assert len(shells.scans) == scans


def test_a_cluster(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, nodes=2, gpus=[{"name": "H100 SXM", "count": 8}])
    fake.fail("POST", "/clusters", None, after=True)
    record = target.up(job, make_record(job), said.append)
    assert len(fake.clusters) == 1 and len(fake.alive()) == 2 and fake.asked("POST", "/pods") == []
    (body,) = fake.asked("POST", "/clusters")
    assert (
        body["compute"] == {"gpuTypeId": H100, "gpuCountPerPod": 8, "podCount": 2}
        and body["type"] == "TRAINING"
    )
    assert record.num_gpus == 16 and record.dollars_per_hour == pytest.approx(16 * 3.99)
    status = target.status(record)
    assert status.machine == "running" and [line[:6] for line in status.nodes] == ["node 0", "node 1"]
    first = next(pod for pod in fake.alive() if pod["cluster"]["rank"] == 0)
    assert shells.addresses[-1]["port"] == first["port"]
    for pod in fake.alive():
        fake.logs[pod["id"]] = [("2027-01-15T08:00:00Z/1", f"I am {pod['cluster']['rank']}")]
    assert list(target.logs(record, follow=False, tail=10)) == ["[node 0] I am 0", "[node 1] I am 1"]
    record = target.down(record, said.append)
    assert fake.clusters == {} and fake.alive() == [] and record.phase == "ended"


def test_a_pod_that_shows_in_the_list_late_is_no_second_one(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost, and the list does not show what was made until the next one runs."""
    fake.fail("POST", "/pods", None, after=True)
    alive, looks = fake.alive, 0

    def late() -> list[dict[str, Any]]:
        nonlocal looks
        looks += 1
        return [] if looks <= 2 else alive()

    monkeypatch.setattr(fake, "alive", late)
    job = make_job(tmp_path, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    assert len(ids(fake)) == 2
    assert [pod["id"] for pod in alive()] == [record.place["id"]] == ["pod2"]
    assert "pod pod1 is a second one of this job: ended" in said


@pytest.mark.parametrize("status", [403, 404])
def test_a_cluster_whose_pods_cannot_be_seen_is_no_refused_one(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], status: int
) -> None:
    job = make_job(tmp_path, nodes=2, gpus=TWO)
    fake.fail("GET", "/clusters/cl2/pods", status, "not yet")
    if status == 403:
        with pytest.raises(Refused, match="cluster's pods"):
            target.up(job, make_record(job), said.append)
        # it is noted, and so is its volume: nothing else was rented, and `up` goes on with it
        found = find_record("tune")
        assert found is not None and found.place["id"] == "cl2" and len(fake.volumes) == 1
        target.up(job, found, said.append)
    else:
        target.up(job, make_record(job), said.append)
    assert len(fake.clusters) == 1 and len(fake.asked("POST", "/clusters")) == 1
    assert len(fake.asked("POST", "/network-volumes")) == 1


def test_a_cluster_that_comes_in_part_is_ended(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    fake.lives = [["PROVISIONING", "RUNNING"], ["PROVISIONING"]]
    job = make_job(tmp_path, nodes=2, limits={"start_minutes": 1.0}, runpod={"data_centers": ["EU-RO-1"]})
    with pytest.raises(EnvironmentFault, match="no candidate") as caught:
        target.up(job, make_record(job), said.append)
    assert "was still PROVISIONING after 1 minutes (limits.start_minutes)" in caught.value.why
    assert fake.clusters == {} and fake.alive() == [] and fake.volumes == {}


def test_a_cluster_that_has_lost_a_node_does_not_run(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, nodes=2)
    record = target.up(job, make_record(job), said.append)
    pods = list(fake.pods.values())
    pods[1]["status"], pods[1]["life"] = "TERMINATED", ["TERMINATED"]
    monkeypatch.setattr(fake, "alive", lambda: pods)  # still listed
    assert target.status(record).machine == "failed"


def test_a_network_that_fails_while_a_pod_starts_is_waited_for(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    for _ in range(7):
        fake.fail("GET", "/pods/pod1", 503, "down for repair")
    job = make_job(tmp_path, **NO_VOLUME)
    assert target.up(job, make_record(job), said.append).phase == "up"
    assert len(fake.alive()) == 1 and any(
        "down for repair" in line and "asked again" in line for line in said
    )


def test_a_pod_that_was_there_and_does_not_come_is_left(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, limits={"start_minutes": 1.0}, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    fake._set(fake.pods["pod1"], "STARTING")
    with pytest.raises(EnvironmentFault, match="pod pod1 has not come within 1 minutes") as caught:
        target.up(job, record, said.append)
    assert "still STARTING" in caught.value.why and "trainway down tune" in caught.value.fix
    assert [pod["id"] for pod in fake.alive()] == ["pod1"] and len(ids(fake)) == 1


def test_what_others_have_on_the_account_keeps_nothing_of_ours(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod of somebody else in a state that nobody has documented."""
    job = make_job(tmp_path, **NO_VOLUME)
    record = target.up(job, make_record(job), said.append)
    shown = fake._shown
    theirs = {
        **shown(fake.pods["pod1"]),
        "id": "x",
        "name": "trainwayless",
        "status": "MIGRATING",
        "cost": None,
    }
    do = fake._do

    def answer(method: str, path: str, query: Any, body: Any) -> Any:
        found = do(method, path, query, body)
        if (method, path) == ("GET", "/pods"):
            found[1]["pods"].append(theirs)
        return found

    monkeypatch.setattr(fake, "_do", answer)
    monkeypatch.setattr(fake, "_checked", lambda method, path, answer: answer)
    assert target.strays([record]) == []
    assert target.down(record, said.append).phase == "ended" and fake.alive() == []
