"""The verbs over a target that keeps its machines in memory: what is asked, noted, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trainway.cli.app import main
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs import verbs
from trainway.jobs.orders import PodState
from trainway.jobs.record import Record, find_record, list_records, load_record, records_dir, save_record
from trainway.jobs.target import Cost, Job, JobStatus, Say, Stray


@dataclass
class MemoryTarget:
    """A provider whose machines are a dict; `fail` is raised by the next call."""

    machines: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    fail: Exception | None = None

    def _may_fail(self) -> None:
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure

    def request(self, job: Job, record: Record) -> Any:
        return {"name": record.remote_name, "env": dict(job.spec.env)}

    def up(self, job: Job, record: Record, say: Say) -> Record:
        assert find_record(record.name) == record  # noted before anything is rented
        self.machines.setdefault(record.remote_name, "running")
        self._may_fail()
        say(f"{record.remote_name} is up")
        return record.with_(phase="up", place={"id": record.remote_name})

    def status(self, record: Record) -> JobStatus:
        self._may_fail()
        pod = PodState(
            job=record.name, stage="train", began=0, updated=1, step=7, total_steps=10, dollars=1.5
        )
        return JobStatus("running", "fine", pod, ("node 1: fine",))

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        yield from ["one", "two"][-(tail or 2) :]

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        self.asked.append(("ssh", list(command)))
        return 7

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        self.asked.append(("tunnel", dict(ports)))
        return 0

    def stop(self, record: Record, say: Say) -> Record:
        return record.with_(phase="stopped")

    def down(self, record: Record, say: Say) -> Record:
        self._may_fail()
        self.machines.pop(record.remote_name, None)
        return record

    def cost(self, record: Record) -> Cost:
        return Cost(2.0, 4.0, 3.5, "until an hour ago")

    def strays(self, records: Sequence[Record]) -> list[Stray]:
        self._may_fail()
        known = {record.remote_name for record in records if record.phase != "ended"}
        return [Stray(name, name, "RUNNING", 2.5, "no job") for name in self.machines if name not in known]

    def end_stray(self, stray: Stray) -> None:
        self._may_fail()
        del self.machines[stray.id]


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryTarget:
    found = MemoryTarget()
    monkeypatch.setattr(verbs, "target_of", lambda name: found)
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    return found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("name: mine\nconfig: m3_medium\ntarget: local\nenv: {A: b}\n")
    return path


def up(job: Path, *words: str, yes: bool = True) -> Record | None:
    return verbs.up(job, words, confirm=lambda text: yes, say=lambda line: None)


def test_up_notes_the_job_before_and_after(target: MemoryTarget, job: Path) -> None:
    record = up(job)
    assert record is not None and record.phase == "up" and record.place == {"id": record.remote_name}
    assert load_record("mine") == record
    assert record.remote_name == f"trainway-mine-{record.token}" and len(record.token) == 8
    assert target.machines == {record.remote_name: "running"}


def test_a_no_rents_and_notes_nothing(target: MemoryTarget, job: Path) -> None:
    assert up(job, yes=False) is None
    assert list_records() == [] and target.machines == {}


def test_up_again_goes_on_with_the_same_machine(target: MemoryTarget, job: Path) -> None:
    target.fail = EnvironmentFault("the answer was lost")
    with pytest.raises(EnvironmentFault):
        up(job)
    asked = load_record("mine")
    assert asked.phase == "asked" and len(target.machines) == 1
    again = verbs.up(job, confirm=lambda text: pytest.fail("asked twice"), say=lambda line: None)
    assert again is not None and again.token == asked.token and again.phase == "up"
    assert len(target.machines) == 1


def test_an_ended_job_starts_anew(target: MemoryTarget, job: Path) -> None:
    first = up(job)
    verbs.down("mine", say=lambda line: None)
    second = up(job)
    assert first and second and first.token != second.token
    assert list(target.machines) == [second.remote_name]


def test_down_is_noted_only_when_it_is_true(target: MemoryTarget, job: Path) -> None:
    up(job)
    target.fail = EnvironmentFault("no answer")
    with pytest.raises(EnvironmentFault):
        verbs.down("mine", say=lambda line: None)
    assert load_record("mine").phase == "up"
    ended = verbs.down(str(job), say=lambda line: None)
    assert (ended.phase, target.machines) == ("ended", {}) and ended.ended is not None
    said: list[str] = []
    verbs.down("mine", say=said.append)
    assert said == ["mine has ended already"]


def test_a_job_whose_machine_cannot_be_asked_is_forgotten_on_request(
    target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up(job)
    target.fail = EnvironmentFault("no route")
    assert main(["down", "mine"]) == 4
    assert main(["down", "mine", "--forget"]) == 0
    assert "see at local that nothing of it goes on costing" in capsys.readouterr().err
    assert load_record("mine").phase == "ended" and len(target.machines) == 1


def test_one_name_is_one_job(target: MemoryTarget, job: Path) -> None:
    up(job)
    with pytest.raises(ConfigError, match="mine is up on local, and the job file says ssh"):
        up(job, "target=ssh", "ssh.host=box")


def test_two_commands_at_once(target: MemoryTarget, job: Path) -> None:
    from trainway.checkpoint.lock import directory_lock

    folder = records_dir()
    with (
        directory_lock(folder, folder / "mine.lock", what="job", setting="name"),
        pytest.raises(EnvironmentFault, match="in use"),
    ):
        up(job)
    assert target.machines == {}


def test_uploads_that_are_not_here_stop_it_before_anything(target: MemoryTarget, job: Path) -> None:
    job.write_text(job.read_text() + "upload: [a.jsonl, b.jsonl]\n")
    (job.parent / "b.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"^a\.jsonl: not there"):
        up(job)
    assert list_records() == [] and target.machines == {}


def test_a_secret_that_is_not_set_here_stops_it_before_anything(
    target: MemoryTarget, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write_text(job.read_text() + "secrets: {WANDB_API_KEY: MY_KEY}\n")
    monkeypatch.delenv("MY_KEY", raising=False)
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(EnvironmentFault, match="MY_KEY: not set here, or empty"):
            up(job)
        assert list_records() == [] and target.machines == {}
    monkeypatch.setenv("MY_KEY", "canary-0123456789")
    record = up(job)
    assert record is not None
    assert all("canary" not in path.read_text() for path in records_dir().glob("*.json"))


def test_a_dry_run_writes_nothing(
    target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(job), "--dry-run", "env.A=c"]) == 0
    request = json.loads(capsys.readouterr().out)
    assert request["env"] == {"A": "c"} and request["name"].startswith("trainway-mine-")
    assert not records_dir().exists() and target.machines == {}


def test_where_nobody_can_be_asked_yes_is_needed(
    target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(job)]) == 2
    assert "fix: add --yes" in capsys.readouterr().err
    assert main(["up", str(job), "--yes", "--follow"]) == 0
    found = capsys.readouterr()
    assert found.out == "one\ntwo\n" and "mine: pretrain on local, one machine" in found.err


def test_status(target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0 and capsys.readouterr().out == "no job is up\n"
    up(job)
    assert main(["status", str(job), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["job"], found["machine"], found["pod"]["step"]) == ("mine", "running", 7)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["mine", "local", "running", "train", "7/10", "$1.50", "fine"]
    assert lines[2].strip() == "node 1: fine"


def test_a_job_that_cannot_be_asked_does_not_hide_the_others(
    target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up(job)
    save_record(Record(name="old", target="ssh", token="0" * 8, created=1.0, phase="up"))
    target.fail = EnvironmentFault("no route")
    assert main(["status"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["old", "ssh", "unknown", "no", "route"]
    assert lines[2].split()[:3] == ["mine", "local", "running"]


def test_an_unknown_job_names_the_known(target: MemoryTarget, job: Path) -> None:
    up(job)
    with pytest.raises(ConfigError, match="there is no job 'other'") as caught:
        verbs.status(["other"])
    assert caught.value.why == "known here are: mine"
    with pytest.raises(ConfigError, match="not the name of a job"):
        verbs.status(["../../etc/passwd"])


def test_ssh_tunnel_logs(target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up(job)
    payload = "$(touch x);'\"\n"
    assert main(["ssh", "mine", "--", "echo", payload]) == 7
    assert main(["tunnel", "mine"]) == 0
    assert main(["tunnel", "mine", "6007:6006", "8000"]) == 0
    assert target.asked == [
        ("ssh", ["echo", payload]),
        ("tunnel", {6006: 6006}),
        ("tunnel", {6007: 6006, 8000: 8000}),
    ]
    assert main(["tunnel", "mine", "70000"]) == 2
    capsys.readouterr()
    assert main(["logs", "mine", "-n", "1"]) == 0 and capsys.readouterr().out == "two\n"


def test_an_ended_job_has_no_machine_to_enter(target: MemoryTarget, job: Path) -> None:
    up(job)
    verbs.down("mine", say=lambda line: None)
    with pytest.raises(EnvironmentFault, match="mine has ended"):
        verbs.ssh("mine")


def test_stop_then_up(target: MemoryTarget, job: Path) -> None:
    first = up(job)
    assert verbs.stop("mine", say=lambda line: None).phase == "stopped"
    second = up(job)
    assert first and second and (second.token, second.phase) == (first.token, "up")


def test_cost(target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up(job)
    assert main(["cost"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["mine", "local", "2.00", "$4.00", "$3.50"]


def test_reap(target: MemoryTarget, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = up(job)
    assert record is not None
    assert main(["reap"]) == 0 and capsys.readouterr().out == "nothing is left running\n"
    target.machines |= {"lost-1": "running", "lost-2": "running"}
    assert main(["reap", "--dry-run"]) == 4
    assert "lost-1" in capsys.readouterr().out and len(target.machines) == 3
    target.fail = None
    assert main(["reap", "local", "--yes"]) == 0
    assert target.machines == {record.remote_name: "running"}
    assert main(["reap", "moon"]) == 2


def test_a_stray_that_will_not_end_is_said(target: MemoryTarget, job: Path) -> None:
    up(job)
    target.machines |= {"lost-1": "running", "lost-2": "running"}

    def confirm(text: str) -> bool:
        target.fail = EnvironmentFault("no answer")
        return True

    (found,) = verbs.reap(("local",), confirm=confirm, say=lambda line: None)
    assert found.ended == ("lost-2",) and found.problem == "lost-1: no answer"


def test_a_record_that_is_damaged(target: MemoryTarget, job: Path) -> None:
    up(job)
    (records_dir() / "mine.json").write_text('{"name": "mine", "what": 1}')
    with pytest.raises(DataError, match="not a job's record"):
        verbs.status(["mine"])
