"""The target `local`: started detached, looked at, stopped and ended, with nothing left running."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pod_material import KEY, ROOT, Job, orders_for
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs import local
from trainway.jobs.local import NAME_MARK, LocalTarget
from trainway.jobs.orders import JobDir
from trainway.jobs.record import Record, forget_record, new_record
from trainway.jobs.spec import JobSpec
from trainway.jobs.target import Job as Asked
from trainway.pod.processes import find_all


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    monkeypatch.setattr(local, "_command", lambda d: [sys.executable, "-m", "tests.fake_pod", str(d.orders)])
    job = Job(tmp_path)
    monkeypatch.setenv("FAKE_DIR", str(job.fake))
    yield job
    left = find_all(lambda environ: environ.get("FAKE_DIR") == str(job.fake))
    for process in left:
        process.kill()
    assert not left


def asked(root: Path, spec: dict[str, Any] | None = None, **more: Any) -> tuple[Asked, Record]:
    values = {"name": "try", "config": "m3_medium", "target": "local", **(spec or {})}
    found = JobSpec.model_validate(values)
    orders = orders_for(root, awaits_upload=bool(found.upload), **more)
    record = new_record("try", "local", root=str(root))
    return Asked(found, RunConfig(), orders, str(root)), record


def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def quiet(line: str) -> None: ...


def test_a_job_runs_detached_to_its_end(job: Job) -> None:
    target, (what, record) = LocalTarget(), asked(job.root)
    record = target.up(what, record, quiet)
    assert record.phase == "up"
    until(lambda: target.status(record).machine == "gone")
    status = target.status(record)
    assert status.pod is not None and (status.pod.outcome, status.pod.step) == ("done", 20)
    lines = list(target.logs(record, follow=False, tail=None))
    assert "\n".join(lines) + "\n" == job.log
    assert list(target.logs(record, follow=True, tail=2)) == lines[-2:]
    assert target.cost(record).estimated == 0.0


def test_stop_saves_and_up_goes_on_from_there(job: Job) -> None:
    job.tell("train", step_s=0.1, once=True)
    target, (what, record) = LocalTarget(), asked(job.root)
    record = target.up(what, record, quiet)
    until(lambda: len(job.steps) >= 3)
    said: list[str] = []
    target.up(what, record, said.append)
    assert said == ["try runs already"]
    assert psutil.Process(job.calls[-1]["pid"]).terminal() is None
    record = target.stop(record, said.append)
    assert record.phase == "stopped"
    assert target.status(record).machine == "stopped"
    saved = job.steps[-1]
    assert said[-1] == f"try has stopped; step {saved} is saved"
    record = target.up(what, record, quiet)
    until(lambda: target.status(record).machine == "gone")
    assert job.steps == list(range(1, 21))


def test_down_leaves_nothing_running_and_everything_on_the_disk(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "DOWN_S", 1.0)
    job.tell("train", hang_at=2, deaf=True)
    target, (what, record) = LocalTarget(), asked(job.root)
    record = target.up(what, record, quiet)
    until(lambda: len(job.steps) >= 2)
    record = target.down(record, quiet)
    assert record.phase == "ended"
    assert find_all(lambda environ: environ.get(NAME_MARK) == record.remote_name) == []
    assert job.steps == [1, 2]


def test_two_nodes_run_here_and_their_lines_are_told_apart(job: Job) -> None:
    target, (what, record) = LocalTarget(), asked(job.root, {"nodes": 2}, nodes=2)
    record = target.up(what, record, quiet)
    until(lambda: target.status(record).machine == "gone")
    assert target.status(record).nodes == ("node 0: ended, done", "node 1: ended, done")
    lines = list(target.logs(record, follow=False, tail=None))
    assert "node 0: this is train" in lines and "node 1: this is train" in lines
    assert JobDir.of(job.root, "try").node(1).log.exists()


def test_what_the_job_needs_is_copied_and_compared(job: Job, tmp_path: Path) -> None:
    data = tmp_path / "my $(touch x) data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "a.txt").write_text("a")
    (job.root / "volume").mkdir()
    upload = [{"path": str(data), "to": "datasets"}]
    target, (what, record) = LocalTarget(), asked(job.root / "volume", {"upload": upload})
    said: list[str] = []
    record = target.up(what, record, said.append)
    assert (job.root / "volume" / "datasets" / "deep" / "a.txt").read_text() == "a"
    assert said[0] == f"{data}: 1 file in {job.root / 'volume' / 'datasets'}"
    target.down(record, quiet)
    what, record = asked(job.root / "volume", {"upload": [{"path": str(data), "to": "../outside"}]})
    with pytest.raises(ConfigError, match="outside of the root"):
        target.up(what, record, quiet)


def test_secrets_come_from_here_and_are_written_nowhere(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    target, (what, record) = LocalTarget(), asked(job.root, {"secrets": {"HF_TOKEN": "MY_TOKEN"}})
    with pytest.raises(EnvironmentFault, match="MY_TOKEN: not set here, or empty"):
        target.up(what, record, quiet)
    monkeypatch.setenv("MY_TOKEN", KEY)
    assert KEY not in json.dumps(target.request(what, record))
    job.tell("train", step_s=0.1)
    record = target.up(what, record, quiet)
    until(lambda: len(job.steps) >= 1)
    training = psutil.Process(job.calls[-1]["pid"])
    assert training.environ()["HF_TOKEN"] == KEY
    target.down(record, quiet)
    files = [path for path in job.root.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_job_that_no_record_knows_is_a_stray(job: Job) -> None:
    job.tell("train", step_s=0.1)
    target, (what, record) = LocalTarget(), asked(job.root)
    record = target.up(what, record, quiet)
    assert target.strays([record]) == []
    forget_record(record.name)
    with pytest.MonkeyPatch.context() as another:
        another.setenv("TRAINWAY_HOME", str(job.root / "another"))
        assert target.strays([]) == []  # a job of another home is none of ours
    (stray,) = target.strays([])
    assert (stray.id, stray.why) == (record.remote_name, "no job of this machine is called so")
    target.end_stray(stray)
    assert target.strays([]) == []


def test_a_supervisor_that_ends_at_once_is_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "import sys; print('error: so', file=sys.stderr); sys.exit(2)"]
    monkeypatch.setattr(local, "_command", lambda d: words)
    target, (what, record) = LocalTarget(), asked(job.root)
    with pytest.raises(EnvironmentFault, match="exit code 2") as raised:
        target.up(what, record, quiet)
    assert raised.value.why == "error: so"


def test_a_supervisor_that_never_takes_up_its_orders_is_given_up_and_ended(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_command", lambda d: [sys.executable, "-c", "import time; time.sleep(3600)"])
    target, (what, record) = LocalTarget(), asked(job.root, limits={"start_minutes": 0.001})
    with pytest.raises(
        EnvironmentFault, match=r"^the supervisor of node 0 has not come within 0.001 minutes"
    ) as raised:
        target.up(what, record, quiet)
    assert raised.value.fix.startswith("it is ended; see ")
    assert find_all(lambda environ: environ.get(NAME_MARK) == record.remote_name) == []
