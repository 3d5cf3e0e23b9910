"""What a job does after it is up: seen, stopped, ended for certain, paid for, and never forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes_runpod import FakeRunPod
from tests.unit.jobs.runpod.conftest import FakeShells, Time, make_job, make_record
from trainway.errors import EnvironmentFault
from trainway.jobs.orders import PodState
from trainway.jobs.record import Record, find_record
from trainway.jobs.runpod.machines import END_ATTEMPTS
from trainway.jobs.runpod.target import RunPodTarget

NO_VOLUME: dict[str, Any] = {"volume": {}, "sync": "s3://bucket/runs"}


def state(time_: Time, stage: Any = "train", **more: Any) -> PodState:
    return PodState(job="tune", stage=stage, began=time_.now, updated=time_.now, step=40, **more)


def started(target: RunPodTarget, folder: Path, **settings: Any) -> Record:
    job = make_job(folder, **settings)
    return target.up(job, make_record(job, limit_hours=10.0), lambda _: None)


def test_status_from_both_sides(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, time_: Time, tmp_path: Path
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    shells.states = [state(time_)]
    seen = target.status(record)
    assert (seen.machine, seen.pod) == ("running", shells.states[0]) and seen.nodes == ()
    assert seen.detail == f"pod {record.place['id']}: RUNNING in EU-RO-1, $3.99 an hour"
    shells.unreachable = 1
    seen = target.status(record)
    assert seen.machine == "running" and seen.pod is None and "no route" in seen.detail
    for status, machine in (("EXITED", "stopped"), ("ERROR", "failed"), ("STARTING", "starting")):
        fake._set(fake.pods[record.place["id"]], status)
        assert target.status(record).machine == machine
    fake._set(fake.pods[record.place["id"]], "TERMINATED")
    assert target.status(record).machine == "gone"
    with pytest.raises(EnvironmentFault, match="no machine"):
        list(target.logs(record, follow=False, tail=None))


def test_down_ends_it_for_certain(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path)
    pod = record.place["id"]
    fake.fail("DELETE", f"/pods/{pod}", None)  # nothing was done
    fake.fail("DELETE", f"/pods/{pod}", 500)
    fake.fail("DELETE", f"/pods/{pod}", None, after=True)  # done, and the answer lost
    record = target.down(record, said.append)
    assert fake.alive() == [] and record.phase == "ended" and record.ended == time_.now
    assert find_record("tune") == record and "id" not in record.place
    assert len(fake.asked("DELETE", f"/pods/{pod}")) == 4  # the fourth one hears that it is gone
    # the volume stays, and is spoken of
    assert len(fake.volumes) == 1 and record.place["volume"] in said[-1]


def test_an_end_that_is_not_confirmed_is_said(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    monkeypatch.setattr(fake, "_set", lambda pod, status: None)  # it says 204 and does nothing
    with pytest.raises(EnvironmentFault, match="may go on costing money"):
        target.down(record, said.append)
    assert len(fake.asked("DELETE", f"/pods/{record.place['id']}")) == END_ATTEMPTS
    found = find_record("tune")
    assert found is not None and found.phase == "up"


def test_down_finds_what_was_never_noted(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(tmp_path, **NO_VOLUME)
    up = target.up(job, make_record(job), said.append)
    body = fake.asked("POST", "/pods")[0]
    fake._new_pod(body, body["gpu"]["id"], 1, None, "SECURE")  # a second one under the name
    bare = Record(name=up.name, target="runpod", token=up.token, created=up.created)
    assert target.down(bare, said.append).phase == "ended" and fake.alive() == []
    assert target.down(bare, said.append).phase == "ended"


def test_stop_saves_and_keeps_the_volume(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path)
    shells.states = [state(time_), state(time_), state(time_, "ended", outcome="stopped", reason="as asked")]
    record = target.stop(record, said.append)
    assert "/workspace/jobs/tune/stop" in shells.inside.written
    assert "it has ended at step 40: as asked" in said
    # a stopped pod's disk would cost, and its GPU may be gone: the volume holds all
    assert fake.alive() == [] and len(fake.volumes) == 1 and record.phase == "stopped"
    again = target.up(make_job(tmp_path), record, said.append)
    assert again.phase == "up" and again.place["volume"] == record.place["volume"]
    assert len(fake.volumes) == 1 and len(fake.alive()) == 1 and len(again.place["spans"]) == 2
    assert ("rm", "-f", "/workspace/jobs/tune/stop") in shells.inside.commands


def test_stop_without_a_volume_stops_the_pod(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    shells.states = [state(time_)]  # it never ends
    began = time_.now
    fake.fail("POST", f"/pods/{record.place['id']}/action", None, after=True)
    record = target.stop(record, said.append)
    assert time_.now - began >= 20 * 60 and any("has not ended within 20 minutes" in line for line in said)
    assert fake.pods[record.place["id"]]["status"] == "EXITED" and record.phase == "stopped"
    pod = record.place["id"]
    again = target.up(make_job(tmp_path, **NO_VOLUME), record, said.append)
    assert again.place["id"] == pod and len(fake.pods) == 1 and fake.pods[pod]["status"] == "RUNNING"
    # what is on its disk is nowhere else: it is not given up without a word
    fake._set(fake.pods[pod], "ERROR")
    with pytest.raises(EnvironmentFault, match="went to ERROR") as caught:
        target.up(make_job(tmp_path, **NO_VOLUME), again, said.append)
    assert "may hold work" in caught.value.why and len(fake.alive()) == 1
    fake._set(fake.pods[pod], "EXITED")
    fake.fail("POST", f"/pods/{pod}/action", 400, "no GPU free on its host")
    with pytest.raises(EnvironmentFault, match="does not start again") as caught:
        target.up(make_job(tmp_path, **NO_VOLUME), again, said.append)
    assert "no GPU free on its host" in caught.value.why and len(fake.alive()) == 1


def test_stop_goes_on_where_nobody_answers(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path)
    shells.unreachable = 99
    assert target.stop(record, said.append).phase == "stopped" and fake.alive() == []
    assert any("could not be asked to save" in line for line in said)
    gone = target.stop(record, said.append)
    assert gone.phase == "stopped"


def test_cost_by_the_clock_and_by_the_bill(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path)
    first = record.place["id"]
    began = record.place["spans"][0]["began"]
    time_.now = began + 2 * 3600
    found = target.cost(record)
    assert found.hours == pytest.approx(2) and found.estimated == pytest.approx(7.98) and found.billed is None
    assert "nothing is billed yet" in found.note and "costs apart" in found.note
    record = target.stop(record, said.append)
    hours = (record.place["spans"][0]["end"] - began) / 3600
    time_.now += 24 * 3600  # costs nothing
    record = target.up(make_job(tmp_path), record, said.append)
    time_.now = record.place["spans"][1]["began"] + 3600
    fake.bills = {first: [3.99, 3.5], record.place["id"]: [2.0]}
    found = target.cost(record)
    assert found.hours == pytest.approx(hours + 1) and found.estimated == pytest.approx(3.99 * (hours + 1))
    assert found.billed == pytest.approx(9.49) and "apart: the bill counts" in found.note
    # it has ended itself, a day ago: the bill knows, and the clock does not
    fake._set(fake.pods[record.place["id"]], "TERMINATED")
    time_.now += 24 * 3600
    assert target.cost(record).hours < hours + 3 and "has ended itself" in target.cost(record).note


def test_strays(
    target: RunPodTarget, fake: FakeRunPod, shells: FakeShells, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    pod = fake.pods[record.place["id"]]
    shells.states = [state(time_)]
    assert target.strays([record]) == []
    body = pod["body"]
    # of a name of ours; of no such name; of one that somebody gave by hand; of somebody else's Trainway; of no mark
    other = {**body, "name": "trainway-other-0a0b0c0d"}
    theirs = {**body["env"], "TRAINWAY_ORIGIN": "0123456789abcdef"}
    unmarked = {key: value for key, value in body["env"].items() if key != "TRAINWAY_ORIGIN"}
    for one in (
        other, {**body, "name": "somebody-elses"}, {**body, "name": "trainway-test"}, {**other, "env": theirs},
        {**other, "env": unmarked},
    ):  # fmt: skip
        fake._new_pod(one, pod["gpu"]["id"], 1, None, "SECURE")
    (stray,) = target.strays([record])
    assert (stray.name, stray.why) == ("trainway-other-0a0b0c0d", "no job of this machine is called so")
    assert stray.dollars_per_hour == 3.99
    target.end_stray(stray)
    assert target.strays([record]) == [] and len(fake.alive()) == 5

    def why(**changes: Any) -> str:
        found = target.strays([record.with_(**changes)])
        return found[0].why if found else ""

    assert why(phase="ended") == "its job has ended"
    assert why(place={**record.place, "id": "pod77"}) == "its job has another machine, pod77"
    assert why(limit_hours=None) == ""
    shells.states = [state(time_, "ended", outcome="done")]
    assert why() == "its work has ended: done, and the machine has not"
    shells.states = [state(time_)]
    time_.now += 45 * 60
    assert why() == "its inside was last heard of 45 minutes ago, and it computes nothing"
    shells.unreachable = 1
    assert why().startswith(
        "it has been up for 45 minutes, computes nothing, and does not answer (it cannot be"
    )
    pod["runtime"] = {"uptime": 2700, "gpus": [{"util": 97, "memoryUtil": 50}]}
    assert why() == ""  # whatever it does not say, it computes
    asked = {key: value for key, value in record.place.items() if key not in ("id", "spans")}
    assert why(phase="asked", place=asked) == "its start was never finished"
    time_.now = record.place["spans"][0]["began"] + 12 * 3600
    assert why() == "its deadline was 2.0 hours ago"


def test_a_cluster_is_a_stray_too(target: RunPodTarget, fake: FakeRunPod, tmp_path: Path) -> None:
    started(target, tmp_path, nodes=2)
    (stray,) = target.strays([])
    assert stray.id.startswith("cluster/") and stray.dollars_per_hour == pytest.approx(7.98)
    target.end_stray(stray)
    assert fake.clusters == {} and fake.alive() == [] and target.strays([]) == []


def test_a_machine_whose_answers_cannot_be_read_is_ended_all_the_same(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    shown = fake._shown
    monkeypatch.setattr(fake, "_shown", lambda pod: {**shown(pod), "status": "HIBERNATING"})
    monkeypatch.setattr(fake, "_checked", lambda method, path, answer: answer)
    assert target.down(record, said.append).phase == "ended" and fake.alive() == []


def test_another_account_s_word_is_not_taken(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    pods, keys = dict(fake.pods), list(fake.keys)
    fake.pods.clear()
    fake.keys = ["ssh-rsa AAAAB3NzaC1yc2E= other@account"]
    for verb in (target.down, target.stop):
        with pytest.raises(EnvironmentFault, match="another account") as caught:
            verb(record, said.append)
        assert "--forget" in caught.value.fix
    found = find_record("tune")
    assert found is not None and found.phase == "up"
    # a key that was taken out by hand keeps nothing alive
    fake.pods.update(pods)
    assert target.down(record, said.append).phase == "ended" and fake.alive() == []
    fake.keys = keys


def test_a_pod_that_was_stopped_and_started_is_billed_once(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = target.stop(started(target, tmp_path, **NO_VOLUME), said.append)
    time_.now += 3600
    record = target.up(make_job(tmp_path, **NO_VOLUME), record, said.append)
    assert len(record.place["spans"]) == 2
    fake.bills = {record.place["id"]: [0.1, 0.1, 0.1, 1.999]}
    assert target.cost(record).billed == 2.299  # to the cent, and beyond


def test_cost_without_the_bill(
    target: RunPodTarget, fake: FakeRunPod, time_: Time, tmp_path: Path, said: list[str]
) -> None:
    record = started(target, tmp_path, **NO_VOLUME)
    time_.now = record.place["spans"][0]["began"] + 3600
    fake.fail("GET", "/billing/pods", 403, "access denied")
    found = target.cost(record)
    assert found.billed is None and found.estimated == pytest.approx(3.99)
    assert (
        "the bill of pod" in found.note
        and "access denied" in found.note
        and "nothing is billed" not in found.note
    )
