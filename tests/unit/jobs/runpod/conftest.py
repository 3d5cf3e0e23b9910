"""A RunPod on this machine, a clock that costs no time, and pods whose inside is a list of what it was told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_runpod import KEY, FakeRunPod, runpod
from trainway.config.schema import RunConfig
from trainway.errors import EnvironmentFault
from trainway.jobs.orders import Orders, PodState
from trainway.jobs.record import Record, new_record, save_record
from trainway.jobs.runpod.api import Api
from trainway.jobs.runpod.clock import Clock
from trainway.jobs.runpod.keys import key_file
from trainway.jobs.runpod.target import RunPodTarget
from trainway.jobs.spec import JobSpec
from trainway.jobs.target import Job

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8m1t9o6m5PRm2Dlm1m0Yt2i1mZ9u7Q8Wb4g7yV3p9q"


@dataclass
class Time:
    """Goes on by what is slept."""

    now: float = 1_800_000_000.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep, chance=lambda: 1.0)


@dataclass
class Inside:
    """What came into a pod."""

    commands: list[tuple[str, ...]] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, Path] = field(default_factory=dict)

    def run(
        self, command: Sequence[str], *, input: bytes | None = None, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(tuple(command))
        if command[0] == "tee":
            self.written[command[1]] = input or b""
        if command[0] == "mv":
            self.written[command[3]] = self.written.pop(command[2])
        return subprocess.CompletedProcess(list(command), 0, b"", b"")

    def upload(self, source: Path, to: str, say: Callable[[str], None]) -> None:
        self.uploads[to] = source

    def interactive(self, command: Sequence[str] = ()) -> int:
        self.commands.append(tuple(command))
        return 7

    def forward(self, ports: Any) -> int:
        self.commands.append(("forward", repr(dict(ports))))
        return 0


@dataclass
class FakeShells:
    """`states`: what the inside says, one a time, the last for ever."""

    inside: Inside = field(default_factory=Inside)
    states: list[PodState | None] = field(default_factory=lambda: [None])
    addresses: list[dict[str, Any]] = field(default_factory=list)
    scans: list[tuple[str, int]] = field(default_factory=list)
    unreachable: int = 0
    """How many connections fail."""

    def connect(self, **address: Any) -> Any:
        self.addresses.append(address)
        if self.unreachable:
            self.unreachable -= 1
            raise EnvironmentFault("it cannot be reached by SSH", "no route")
        return self.inside

    def scan(self, host: str, port: int) -> str:
        self.scans.append((host, port))
        return HOST_KEY

    def state(self, connection: Any, job_dir: Any) -> PodState | None:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@pytest.fixture
def time_() -> Time:
    return Time()


@pytest.fixture(scope="session")
def made_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a key pair: made once, it is the same to every test but the one of its making."""
    path = tmp_path_factory.mktemp("ssh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINWAY_HOME", str(path))
        return key_file().parent


@pytest.fixture
def home(tmp_path: Path, made_key: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    shutil.copytree(made_key, path / "ssh")
    monkeypatch.setenv("TRAINWAY_HOME", str(path))
    return path


@pytest.fixture
def fake(time_: Time, home: Path) -> Iterator[FakeRunPod]:
    """Checked at the end: nothing wrong was sent or answered, and the key is nowhere but in the headers."""
    with runpod(lambda: time_.now) as found:
        yield found
        assert found.violations == []
        assert KEY.encode() not in bytes(found.raw)
    for path in home.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def shells() -> FakeShells:
    return FakeShells()


@pytest.fixture
def api(fake: FakeRunPod, time_: Time) -> Iterator[Api]:
    with Api(fake.url, KEY, clock=time_.clock) as found:
        yield found


@pytest.fixture
def target(fake: FakeRunPod, time_: Time, shells: FakeShells) -> RunPodTarget:
    return RunPodTarget(lambda: Api(fake.url, KEY, clock=time_.clock), shells)


@pytest.fixture
def said() -> list[str]:
    return []


def make_job(folder: Path, **settings: Any) -> Job:
    """A job on one H100 with a new volume; `settings` over its file."""
    orders = settings.pop("orders", {})
    values: dict[str, Any] = {
        "name": "tune", "config": "m3_medium", "target": "runpod", "gpus": [{"name": "H100 SXM"}],
        "volume": {"size_gb": 100}, "source": "trainway==1.0", **settings,
    }  # fmt: skip
    spec = JobSpec.model_validate(values)
    told: dict[str, Any] = {
        "job": spec.name, "config": {}, "root": spec.root or "/workspace", "nodes": spec.nodes, "ender": "runpod",
        "limits": {**spec.limits.model_dump(), "hours": spec.limits.hours or 10.0}, "release": spec.at_end.release,
        "sync": spec.sync, "awaits_upload": bool(spec.upload), **orders,
    }  # fmt: skip
    return Job(
        spec, RunConfig(name=spec.name, run_dir=f"runs/{spec.name}"), Orders.model_validate(told), str(folder)
    )


def make_record(job: Job, **values: Any) -> Record:
    record = new_record(job.spec.name, "runpod", root=job.orders.root, **values)
    save_record(record)
    return record
