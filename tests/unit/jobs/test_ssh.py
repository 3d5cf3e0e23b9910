"""A job's life on a machine with SSH, with a supervisor that only pretends to train."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.sshd import Server, needs_sshd, new_server, plain_environment
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs import ssh
from trainway.jobs.orders import JobDir, Orders
from trainway.jobs.record import Record, new_record, records_dir, save_record
from trainway.jobs.shell.command import Address
from trainway.jobs.shell.environment import find_source
from trainway.jobs.shell.far_job import MARK, processes
from trainway.jobs.shell.readiness import check_room, fitting_python, uploads
from trainway.jobs.spec import JobSpec
from trainway.jobs.ssh import SshTarget
from trainway.jobs.target import Job

CANARY = "canary-77aa-secret"
EVIL = "$(touch x);'\"\nnext"
SUPERVISOR = """#!/usr/bin/env python3
import fcntl, json, os, signal, subprocess, sys, time
assert sys.argv[1:3] == ["-m", "trainway.pod"], sys.argv
orders = json.load(open(sys.argv[3]))
folder = os.path.dirname(sys.argv[3])
lock = open(os.path.join(folder, "job.lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
def say(**more):
    state = dict(job=orders["job"], stage="train", began=1.0, updated=time.time(), step=3, **more)
    path = os.path.join(folder, "state.json")
    with open(path + ".new", "w") as file:
        json.dump(state, file)
    os.replace(path + ".new", path)
open(os.path.join(folder, "log.txt"), "a").write("begins under " + orders["token"] + "\\n")
if orders["inputs"] == ["fail"]:
    child.kill()
    sys.exit("error: nothing good")
say()
while not stopped:
    time.sleep(0.02)
if orders["inputs"] != ["orphan"]:
    child.kill()
say(outcome="stopped")
sys.exit(75)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    needs_sshd()
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "known"))
    monkeypatch.setenv("TEST_CANARY", CANARY)
    monkeypatch.setattr(ssh, "LOOK_S", 0.1)
    monkeypatch.setattr(ssh, "KILL_LOOKS", 300)
    made = new_server(tmp_path / "sshd", plain_environment(tmp_path / "home"))
    made.start()
    install(tmp_path / "home" / "trainway", "trainway==9")
    yield made
    made.stop()


def install(root: Path, source: str) -> None:
    """What `bring` would have made, with the supervisor above in the place of Python."""
    python = root / "trainway-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SUPERVISOR)
    python.chmod(0o755)
    (root / "trainway-env" / ".trainway").write_text(hashlib.sha256(source.encode()).hexdigest() + " ")


def make_job(folder: Path, server: Server, *, inputs: tuple[str, ...] = (), **ssh: Any) -> Job:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / EVIL).write_text(EVIL)
    address = server.address
    spec = JobSpec.model_validate(
        {
            "name": "try",
            "config": "m3_medium",
            "target": "ssh",
            "upload": ["data"],
            "env": {"ODD": EVIL},
            "secrets": {"HF_TOKEN": "TEST_CANARY"},
            "source": "trainway==9",
            "ssh": {
                "host": address.host,
                "port": address.port,
                "user": address.user,
                "key": address.key,
                **ssh,
            },
        }
    )
    orders = Orders.model_validate(
        {"job": "try", "config": {}, "root": "~/trainway", "limits": {"hours": 1}, "inputs": inputs}
    )
    return Job(spec, cast(RunConfig, None), orders, str(folder))


def new(name: str = "try") -> Record:
    record = new_record(name, "ssh")
    save_record(record)
    return record


def supervisors(record: Record) -> list[int]:
    return [one["pid"] for one in processes(record.remote_name) if one["supervisor"]]


def test_up_attach_stop_up_down(server: Server, tmp_path: Path) -> None:
    target, record, said = SshTarget(), new(), cast(list[str], [])
    job = make_job(tmp_path / "project", server, end_command=["touch", str(tmp_path / "ended; it's")])
    place = JobDir.of(tmp_path / "home" / "trainway", "try")
    try:
        record = target.up(job, record, said.append)
        assert record.phase == "up" and record.root == str(tmp_path / "home" / "trainway")
        assert any("SHA256:" in line and "pinned" in line for line in said)
        assert (tmp_path / "home" / "trainway" / "data" / EVIL).read_text() == EVIL
        [pid] = supervisors(record)
        assert os.getsid(pid) == pid  # nobody's terminal takes it along
        environ = dict(
            item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if item
        )
        assert (environ["HF_TOKEN"], environ["ODD"], environ[MARK]) == (CANARY, EVIL, record.remote_name)
        assert place.orders.stat().st_mode & 0o777 == 0o600 and place.uploaded.exists()
        lines = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()]
        assert not [path for path in lines if path.exists() and CANARY.encode() in path.read_bytes()]

        said.clear()
        record = target.up(job, record, said.append)
        assert said == [f"try runs on {server.address} already: nothing is started"]
        assert supervisors(record) == [pid]
        status = target.status(record)
        assert status.machine == "running" and status.pod is not None and status.pod.step == 3
        stranger = Record(**{**record.__dict__, "token": "00000000"})
        # other tests may have jobs on this machine at the same time
        assert record.remote_name in [stray.name for stray in target.strays([stranger])]
        assert record.remote_name not in [stray.name for stray in target.strays([record])]

        assert server.cut() >= 0 and supervisors(record) == [pid]
        record = target.stop(record, said.append)
        assert record.phase == "stopped" and processes(record.remote_name) == []
        assert place.stop_request.exists()
        assert target.status(record).machine == "stopped"

        said.clear()
        record = target.up(job, record, said.append)
        assert "all files are there already" in said and not place.stop_request.exists()
        tokens = {line.rpartition(" ")[2] for line in place.log.read_text().splitlines()}
        assert len(tokens) == 2  # so that what was stopped is taken up again
        assert list(target.logs(record, follow=False, tail=1)) == place.log.read_text().splitlines()[-1:]
        assert target.ssh(record, ["sh", "-c", "exit 5"]) == 5

        record = target.down(record, said.append)
        assert record.phase == "ended" and record.ended is not None and processes(record.remote_name) == []
        assert (tmp_path / "ended; it's").exists()
        assert target.down(record, said.append).phase == "ended"  # nothing to do, and nothing fails
        assert target.cost(record).estimated == 0
    finally:
        end(record)
    written = [path for top in ("home", "known", "project") for path in (tmp_path / top).rglob("*")]
    assert records_dir() / "try.json" in written
    assert [path for path in written if path.is_file() and CANARY.encode() in path.read_bytes()] == []
    assert not list(tmp_path.rglob("x"))


def end(record: Record) -> None:
    for one in processes(record.remote_name):
        subprocess.run(["kill", "-9", str(one["pid"])], check=False)


@pytest.mark.slow  # the stray above is ended in the same way
def test_down_kills_what_the_supervisor_leaves(server: Server, tmp_path: Path) -> None:
    target, record, said = SshTarget(), new(), cast(list[str], [])
    try:
        record = target.up(make_job(tmp_path / "project", server, inputs=("orphan",)), record, said.append)
        record = target.stop(record, said.append)
        assert "1 processes are left" in target.status(record).detail
        target.down(record, said.append)
        assert processes(record.remote_name) == []
    finally:
        end(record)


@pytest.mark.parametrize("inputs", [pytest.param((), marks=pytest.mark.slow), ("orphan",)])
def test_a_stray_there_is_asked_to_save_and_ends_with_all_that_it_has_started(
    server: Server, tmp_path: Path, inputs: tuple[str, ...]
) -> None:
    target, record, said = SshTarget(), new(), cast(list[str], [])
    try:
        record = target.up(make_job(tmp_path / "project", server, inputs=inputs), record, said.append)
        save_record(known := Record(**{**record.__dict__, "phase": "ended"}))
        (stray,) = [found for found in target.strays([known]) if found.name == record.remote_name]
        assert (stray.id, stray.why) == (f"{record.remote_name}@try", "its job has ended")
        target.end_stray(stray)
        assert processes(record.remote_name) == []
        state = json.loads(JobDir.of(tmp_path / "home" / "trainway", "try").state.read_text())
        assert state["outcome"] == "stopped"  # asked, and not killed
        assert record.remote_name not in [found.name for found in target.strays([known])]
    finally:
        end(record)


def test_a_stray_that_does_not_end_in_time_is_killed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, record = SshTarget(), new()
    try:
        record = target.up(make_job(tmp_path / "project", server), record, lambda line: None)
        save_record(known := Record(**{**record.__dict__, "place": {**record.place, "save_s": 0.0}}))
        [pid] = supervisors(record)
        os.kill(pid, signal.SIGSTOP)  # deaf
        (stray,) = [
            s
            for s in target.strays([Record(**{**known.__dict__, "token": "0" * 8})])
            if s.name == record.remote_name
        ]
        target.end_stray(stray)
        assert processes(record.remote_name) == []
    finally:
        end(record)


def test_what_ends_at_once_says_why(server: Server, tmp_path: Path) -> None:
    record = new()
    with pytest.raises(EnvironmentFault, match="ended at once") as failed:
        SshTarget().up(make_job(tmp_path / "project", server, inputs=("fail",)), record, lambda line: None)
    assert "nothing good" in failed.value.why
    end(record)


def test_a_machine_with_another_key_gets_nothing(server: Server, tmp_path: Path) -> None:
    target, record = SshTarget(), new()
    try:
        record = target.up(make_job(tmp_path / "project", server), record, lambda line: None)
    finally:
        end(record)
    server.stop()
    server.new_host_key()
    server.start()
    for ask in (
        lambda: target.up(make_job(tmp_path / "project", server), record, lambda line: None),
        lambda: target.status(record),
        lambda: target.down(record, lambda line: None),
    ):
        with pytest.raises(EnvironmentFault, match="another host key"):
            ask()
    server.stop()
    assert target.status(record).machine == "unknown"


def test_the_request_needs_no_machine_and_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path))
    monkeypatch.delenv("TEST_CANARY", raising=False)
    nowhere = Server(tmp_path / "nowhere", 1)
    nowhere.folder.mkdir()
    (nowhere.folder / "host.pub").write_text("ssh-ed25519 AAAA")
    record = new_record("try", "ssh")
    job = make_job(tmp_path / "project", nowhere)
    asked = SshTarget().request(job, record)
    assert json.loads(json.dumps(asked)) == asked
    assert asked["command"][1:] == ["-m", "trainway.pod", "~/trainway/jobs/try/orders.json"]
    assert asked["upload"] == [{"from": str(tmp_path / "project" / "data"), "to": "~/trainway/data"}]
    assert asked["install"] == [["trainway==9"]] and asked["secrets"] == ["HF_TOKEN"]
    with pytest.raises(EnvironmentFault, match="TEST_CANARY: not set here, or empty"):
        SshTarget().up(job, record, lambda line: None)
    # a job that no machine has ever seen can be ended
    assert SshTarget().down(record, lambda line: None).phase == "ended"


def test_what_a_machine_must_have(tmp_path: Path) -> None:
    job = make_job(tmp_path, Server(tmp_path, 1)) if (tmp_path / "host.pub").write_text("a b") else None
    assert job is not None
    address = Address("there")
    good = ["/usr/bin/python3.12", 3, 12, True]
    facts: dict[str, Any] = {"gpus": [], "pythons": [["/usr/bin/python3", 3, 10, True], good], "root": "/r"}
    assert fitting_python(job, facts, address) == "/usr/bin/python3.12"
    for pythons, message in (
        ([["/p", 3, 10, True]], "no Python 3.11"),
        ([], "no Python 3.11"),
        ([["/p", 3, 11, False]], "makes no virtual environments"),
    ):
        with pytest.raises(EnvironmentFault, match=message):
            fitting_python(job, {**facts, "pythons": pythons}, address)
    spec = job.spec.model_validate({**job.spec.model_dump(), "gpus": [{"name": "H100 SXM", "count": 4}]})
    with pytest.raises(EnvironmentFault, match="shows 1 GPUs, and the job wants 4"):
        fitting_python(Job(spec, job.config, job.orders, job.folder), {**facts, "gpus": ["H100"]}, address)
    room = {**facts, "writable": True, "installed": True, "free": 10}
    with pytest.raises(EnvironmentFault, match="free at /r"):
        check_room(job, room, address)
    check_room(job, {**room, "free": 1000}, address)
    with pytest.raises(EnvironmentFault, match="free at /r"):
        check_room(job, {**room, "free": 2 << 30, "installed": False}, address)
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        check_room(job, {**room, "writable": False}, address)
    for to, fault in (("../out", ConfigError), ("/etc", ConfigError), ("a/../../b", ConfigError)):
        bad = job.spec.model_validate({**job.spec.model_dump(), "upload": [{"path": "data", "to": to}]})
        with pytest.raises(fault, match="leads out"):
            uploads(Job(bad, job.config, job.orders, job.folder))
    gone = job.spec.model_validate({**job.spec.model_dump(), "upload": ["gone"]})
    with pytest.raises(DataError, match="is not there"):
        uploads(Job(gone, job.config, job.orders, job.folder))


def test_sources_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "trainway"\n')
    (tmp_path / "constraints.txt").write_text("numpy==2\ntorch==2.13.0\n")
    (tmp_path / "src" / "a.py").write_text("1")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "b.py").write_text("2")
    first = find_source(".", str(tmp_path))
    assert [entry["path"] for entry in first.entries] == ["constraints.txt", "pyproject.toml", "src/a.py"]
    assert first.steps("/p", "[s3]") == [["torch==2.13.0"], ["-c", "/p/constraints.txt", "/p[s3]"]]
    assert find_source(".", str(tmp_path)).version == first.version
    (tmp_path / "src" / "a.py").write_text("3")
    assert find_source(".", str(tmp_path)).version != first.version
    (tmp_path / "t.whl").write_bytes(b"wheel")
    wheel = find_source("t.whl", str(tmp_path))
    assert wheel.steps("/p", "") == [["/p/t.whl"], ["--force-reinstall", "--no-deps", "/p/t.whl"]]
    for wrong in ("--index-url=x", "./gone", "gone.whl", "src"):
        with pytest.raises(ConfigError):
            find_source(wrong, str(tmp_path))
