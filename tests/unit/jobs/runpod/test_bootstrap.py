"""The first program on a pod: it waits no longer than it may, installs, and ends the pod when it cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes_runpod import KEY, FakeRunPod
from tests.unit.jobs.runpod.test_api import BODY
from trainway.jobs.runpod import bootstrap
from trainway.jobs.runpod.api import Api

ORDERS: dict[str, Any] = {
    "root": "",
    "job": "tune",
    "limits": {"upload_minutes": 0.001},
    "machine": "terminate",
}


class Slept(Exception):
    """The bootstrap has nothing left to do."""


@pytest.fixture
def pod_id(api: Api, fake: FakeRunPod, monkeypatch: pytest.MonkeyPatch) -> str:
    fake.lives = [["RUNNING"]]
    pod = api.create_pod(BODY)
    for name, value in {
        "RUNPOD_API_KEY": KEY,
        "RUNPOD_POD_ID": pod.id,
        "TRAINWAY_RUNPOD_API": fake.url,
    }.items():
        monkeypatch.setenv(name, value)

    def sleep(seconds: float) -> None:
        if seconds == 3600:
            raise Slept

    monkeypatch.setattr(bootstrap, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    return pod.id


def test_it_ends_the_pod_however_often_that_takes(
    fake: FakeRunPod, pod_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"/pods/{pod_id}/action"
    fake.fail("POST", path, 500)
    fake.fail("POST", path, None)
    fake.fail("POST", path, 429)
    with pytest.raises(Slept):
        bootstrap.end(ORDERS)
    assert fake.alive() == [] and len(fake.asked("POST", path)) == 5  # three faults, done, and gone
    assert KEY not in capsys.readouterr().out


def test_a_stop_keeps_the_disk_and_keep_keeps_all(fake: FakeRunPod, pod_id: str) -> None:
    with pytest.raises(Slept):
        bootstrap.end({**ORDERS, "machine": "keep"})
    assert fake.pods[pod_id]["status"] == "RUNNING"


def test_a_pod_of_a_cluster_ends_the_cluster(fake: FakeRunPod, pod_id: str) -> None:
    fake.clusters["cl9"] = {"id": "cl9", "name": "trainway-x-00000000", "createdAt": "2027-01-15T08:00:00Z",
                            "compute": {"gpuTypeId": "x", "gpuCountPerPod": 1, "podCount": 2}}  # fmt: skip
    fake.pods[pod_id]["cluster"] = {"id": "cl9", "rank": 0}
    with pytest.raises(Slept):
        bootstrap.end(ORDERS)
    assert fake.clusters == {} and fake.alive() == []


def test_files_that_never_come_end_the_pod(
    fake: FakeRunPod,
    pod_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRAINWAY_ORDERS", json.dumps({**ORDERS, "root": str(tmp_path)}))
    monkeypatch.setenv("TRAINWAY_SOURCE", "upload")
    monkeypatch.setattr(bootstrap, "start_sshd", lambda: None)
    monkeypatch.setattr(bootstrap, "say_host_key", lambda: None)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Slept):
        bootstrap.main()
    out = capsys.readouterr().out
    assert "it has not come within 0 minutes" in out and fake.alive() == []


@pytest.mark.parametrize(
    ("source", "installed"),
    [("trainway==1.0", "trainway==1.0"), ("upload", "ROOT/jobs/tune/source/trainway-1.tar.gz")],
)
def test_what_pip_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, installed: str
) -> None:
    folder = tmp_path / "jobs" / "tune" / "source"
    folder.mkdir(parents=True)
    (folder / "READY").write_text("../../../evil/trainway-1.tar.gz\n")  # a name, never a way out
    commands: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        commands.append((command, env))

    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    bootstrap.install(source, {**ORDERS, "root": str(tmp_path)})
    ((command, env),) = commands
    assert command[1:4] == ["-m", "pip", "install"] and command[-2:] == [
        "--",
        installed.replace("ROOT", str(tmp_path)),
    ]
    assert KEY not in env.values() and "TRAINWAY_ORDERS" not in env


def test_an_image_that_has_trainway_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("pip was run"))
    bootstrap.install("upload", ORDERS)


def test_the_key_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAAC3Nz root@pod\n")
    monkeypatch.setattr(bootstrap, "HOST_KEY", str(key))
    bootstrap.say_host_key()
    assert capsys.readouterr().out == "[BOOT] host key: ssh-ed25519 AAAAC3Nz\n"


def test_the_image_s_own_start_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tmp_path / "start.sh"
    start.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    start.chmod(0o755)
    monkeypatch.setattr(bootstrap, "START", str(start))
    bootstrap.start_sshd()
    while not (tmp_path / "started").exists():  # the test's own time limit ends it
        time.sleep(0.05)


def test_it_needs_nothing_but_the_standard_library() -> None:
    program = Path(bootstrap.__file__).read_text()
    code = f"import sys\nexec(compile({program!r}, 'bootstrap', 'exec'), {{'__name__': 'x'}})\n"
    code += (
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'__main__'})"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "", done.stderr
