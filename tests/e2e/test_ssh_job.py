"""A job on a machine with SSH from a bare home directory to the released model, through cuts and kills."""

from __future__ import annotations

import base64
import hashlib
import os
import site
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import trainway
from tests.conftest import metrics, tiny
from tests.sshd import Server, needs_sshd, new_server, plain_environment
from trainway.config.files import config_values
from trainway.config.load import load_config
from trainway.jobs.orders import JobDir, Orders
from trainway.jobs.record import Record, load_record, new_record, records_dir, save_record
from trainway.jobs.shell import connection as connection_module
from trainway.jobs.shell.far_job import MARK
from trainway.jobs.spec import JobSpec
from trainway.jobs.ssh import SshTarget
from trainway.jobs.target import Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CANARY = "canary-4f1c9a-secret"
EVIL = "$(touch x);'\"\nnext"


def small_wheel(folder: Path) -> Path:
    """Trainway as a wheel without dependencies: pip installs it without a network."""
    source, name = Path(trainway.__file__).parent, "trainway-0.0.0"
    files = {f"trainway/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*") if p.is_file()}
    files = {path: content for path, content in files.items() if "__pycache__" not in path}
    files[f"{name}.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: trainway\nVersion: 0.0.0\n"
    files[f"{name}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(content)}\n")
    files[f"{name}.dist-info/RECORD"] = "".join([*rows, f"{name}.dist-info/RECORD,,\n"]).encode()
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def libraries(folder: Path) -> Path:
    """What this interpreter has, but neither Trainway nor pip: those are the machine's own."""
    folder.mkdir()
    for place in [path for path in sys.path if path in site.getsitepackages()]:
        for entry in Path(place).iterdir():
            if not entry.name.lower().startswith(
                ("trainway", "_trainway", "__editable__", "pip", "_editable")
            ):
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    needs_sshd()
    python_path = str(libraries(tmp_path / "libraries"))
    environment = plain_environment(
        tmp_path / "home", PYTHONPATH=python_path, PIP_NO_INDEX="1", HF_HUB_OFFLINE="1"
    )
    made = new_server(tmp_path / "sshd", environment)
    made.start()
    yield made
    made.stop()


def make_job(folder: Path, server: Server, corpus: Path, steps: int) -> Job:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_bytes(corpus.read_bytes())
    (folder / "data" / EVIL).write_text(EVIL)
    config: dict[str, Any] = tiny(
        Path("data/train.jsonl"), Path("cache/try"), Path("runs/try"), total_steps=steps
    )
    config["name"] = "try"
    config["engine"] = {"name": "ddp"}
    config["checkpoint"] = {"save_every": 5}
    address = server.address
    spec = JobSpec.model_validate(
        {
            "name": "try",
            "config": "run.yaml",
            "target": "ssh",
            "processes": 2,
            "upload": ["data"],
            "env": {"ODD": EVIL},
            "secrets": {"HF_TOKEN": "TEST_CANARY"},
            "source": str(small_wheel(folder)),
            "at_end": {"release": {"to": str(folder / "released")}},
            "ssh": {"host": address.host, "port": address.port, "user": address.user, "key": address.key},
        }
    )
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    loaded = load_config(folder / "run.yaml", environ={}).config
    orders = Orders(
        job="try",
        config=config_values(loaded),
        root="~/trainway",
        processes=2,
        awaits_upload=True,
        limits={"hours": 2},
        release=spec.at_end.release,
        guard_every_s=0.5,
    )
    return Job(spec, loaded, orders, str(folder))


class Watch(threading.Thread):
    """Looks at every command line of this machine for the secret, as long as it lives."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: list[str] = []
        self.looks = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.looks += 1
            for name in os.listdir("/proc"):
                try:
                    line = Path("/proc", name, "cmdline").read_bytes() if name.isdigit() else b""
                except OSError:
                    continue
                if CANARY.encode() in line:
                    self.found.append(line.decode(errors="replace"))


def of_job(record: Record) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == record.remote_name:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait(what: str, condition: Any, place: JobDir, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: {place.log.read_text() if place.log.exists() else 'no log'}"
        time.sleep(0.2)


def test_the_whole_story(
    server: Server, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RETRY_S", (0.5,) * 100)
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "known"))
    monkeypatch.setenv("TEST_CANARY", CANARY)
    job = make_job(tmp_path / "project", server, corpus, steps=30)
    target = SshTarget()
    record = new_record("try", "ssh")
    save_record(record)
    home = tmp_path / "home"
    place = JobDir.of(home / "trainway", "try")
    asked = target.request(job, record)
    assert asked["secrets"] == ["HF_TOKEN"] and CANARY not in str(asked) and not (home / "trainway").exists()
    watch = Watch()
    watch.start()
    said: list[str] = []
    try:
        record = target.up(job, record, said.append)
        assert load_record("try") == record and record.phase == "up"
        assert record.root == str(home / "trainway")
        assert any("SHA256:" in line for line in said)
        python = home / "trainway" / "trainway-env" / "bin" / "python"
        installed = list(python.parents[1].glob("lib/*/site-packages/trainway/jobs/ssh.py"))
        assert len(installed) == 1
        assert (home / "trainway" / "data" / EVIL).read_text() == EVIL

        # a second `up` attaches
        supervisors = [p.pid for p in of_job(record) if "trainway.pod" in p.cmdline()]
        assert len(supervisors) == 1
        said.clear()
        target.up(job, record, said.append)
        assert any("nothing is started" in line for line in said), said
        assert [p.pid for p in of_job(record) if "trainway.pod" in p.cmdline()] == supervisors
        environ = psutil.Process(supervisors[0]).environ()
        assert environ["HF_TOKEN"] == CANARY and environ["ODD"] == EVIL

        # the line is cut while the log is read, and the training is killed
        lines: list[str] = []
        reader = threading.Thread(
            target=lambda: lines.extend(target.logs(record, follow=True, tail=None)), daemon=True
        )
        reader.start()
        run = home / "trainway" / "runs" / "try"
        wait("steps", lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 6, place)
        assert server.cut() > 0
        assert psutil.pid_exists(supervisors[0])
        victims = [p for p in of_job(record) if "RANK" in p.environ()]
        assert len(victims) == 2
        victims[0].kill()
        wait("the end", lambda: not of_job(record), place)
        reader.join(120)
        assert not reader.is_alive()
        assert lines == place.log.read_text().splitlines()

        status = target.status(record)
        assert status.machine == "stopped" and status.pod is not None
        assert (status.pod.outcome, status.pod.step, status.pod.crashes) == ("done", 30, 0)
        assert status.pod.attempts == 2
        assert [r["step"] for r in metrics(run)] == list(range(1, 31))
        assert list((tmp_path / "project" / "released").glob("**/*.safetensors"))

        record = target.down(record, said.append)
        assert record.phase == "ended" and record.remote_name not in [
            stray.name for stray in target.strays([record])
        ]
        assert of_job(record) == []
    finally:
        watch.over.set()
        watch.join()
        for process in of_job(record):
            process.kill()
    assert watch.looks > 10 and watch.found == []
    written = [
        path for top in (home, records_dir(), tmp_path / "sshd") for path in top.rglob("*") if path.is_file()
    ]
    assert place.orders in written and records_dir() / "try.json" in written
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert not list(tmp_path.rglob("x"))


def test_stop_saves_and_up_goes_on_and_down_leaves_nothing(
    server: Server, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "known"))
    monkeypatch.setenv("TEST_CANARY", CANARY)
    job = make_job(tmp_path / "project", server, corpus, steps=2000)
    target, place = SshTarget(), JobDir.of(tmp_path / "home" / "trainway", "try")
    record = new_record("try", "ssh")
    save_record(record)
    run = tmp_path / "home" / "trainway" / "runs" / "try"
    said: list[str] = []
    try:
        record = target.up(job, record, said.append)
        wait("steps", lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3, place)
        record = target.stop(record, said.append)
        assert record.phase == "stopped" and of_job(record) == []
        pod = target.status(record).pod
        assert pod is not None and pod.outcome == "stopped" and pod.saved_step == pod.step > 0
        said.clear()
        record = target.up(job, record, said.append)
        assert any(line.startswith("Trainway is there") for line in said), said
        assert "all files are there already" in said
        wait("more steps", lambda: len(metrics(run)) > pod.step, place)
        stranger = new_record("try", "ssh")
        strays = target.strays([Record(**{**stranger.__dict__, "place": record.place})])
        assert [(stray.name, stray.state) for stray in strays] == [(record.remote_name, "running")]
        record = target.down(record, said.append)
        assert of_job(record) == [] and record.phase == "ended"
        steps = [r["step"] for r in metrics(run)]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        for process in of_job(record):
            process.kill()
