"""`trainway runs sync`: which trackers of which runs, and what it says of each; `trainway runs` lists as before."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.tracker_readers import recorded, wandb_points
from trainway.checkpoint.lock import run_lock
from trainway.cli.app import main
from trainway.errors import ConfigError, DataError
from trainway.run_dir import RunDir
from trainway.tracking import follower
from trainway.tracking.sync import sync_runs


def make_run(path: Path, *trackers: str, steps: int = 7, state: str = "running") -> RunDir:
    """What a run leaves that was killed, or whatever `state` says."""
    run = RunDir(path)
    path.mkdir(parents=True)
    run.config.write_text(f"tracking: {{report_to: [{', '.join(trackers)}]}}\nmodel: {{hidden_size: 32}}\n")
    run.status.write_text(json.dumps({"state": state, "step": steps, "time": ""}))
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "train/loss": 1 / step, "perf/step_s": 0.1}) + "\n")
    return run


def test_what_cannot_be_done_is_said_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", "wandb")
    with pytest.raises(ConfigError, match="--to names pigeon") as caught:
        sync_runs([run.path], ["pigeon"])
    assert caught.value.fix == "trackers that can be brought up to date: wandb, mlflow, trackio"
    with pytest.raises(ConfigError) as caught:
        sync_runs([run.path], ["tensorboard"])
    assert caught.value.why == "TensorBoard reads the run directory itself"
    with pytest.raises(DataError, match="is no run"):
        sync_runs([run.path, tmp_path])
    with pytest.raises(DataError, match="there is no directory"):
        sync_runs([], runs_dir=tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["runs", "sync", str(run.path), "--to", "trackio"]) == 4


def test_offline_wandb_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = make_run(tmp_path / "runs" / "one", "wandb")
    make_run(tmp_path / "runs" / "two")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    assert main(["runs", "sync"]) == 0
    assert capsys.readouterr().out.startswith("runs/one: wandb is complete, sent up to step 7 (")
    assert wandb_points(run.path) == recorded(run.path)
    shutil.rmtree(tmp_path / "wandb")
    (before,) = run.path.glob("wandb/offline-run-*")
    assert main(["runs", "sync", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["run"], said["tracker"], said["state"], said["steps_to"]) == (
        "runs/one",
        "wandb",
        "complete",
        None,
    )
    assert list(run.path.glob("wandb/offline-run-*")) == [before]


def test_a_run_that_feeds_its_tracker_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    run = make_run(tmp_path / "run", "mlflow")
    with run.tracker_lock("mlflow").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["runs", "sync", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}: mlflow is being fed by the run itself\n"


def test_a_tracker_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    run = make_run(tmp_path / "run", "mlflow")
    asleep = tmp_path / "asleep"
    asleep.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    asleep.chmod(0o755)
    monkeypatch.setattr(follower.sys, "executable", str(asleep))
    (found,) = sync_runs([run.path], silence_s=0.2)
    assert (found.state, found.why) == ("lost", "no answer for 0.2 s")


@pytest.mark.parametrize(
    ("state", "outcome"), [("done", "done"), ("stopped", "stopped"), ("running", "failed")]
)
def test_how_a_run_ended(tmp_path: Path, state: str, outcome: str) -> None:
    from trainway.tracking.sync import _outcome

    run = make_run(tmp_path / "run", state=state)
    assert _outcome(run) == outcome
    with run_lock(run):
        assert _outcome(run) == "running"


def test_runs_lists_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "one", state="done")
    make_run(tmp_path / "sync", state="stopped")
    for words in (["runs", str(tmp_path)], ["runs", "list", str(tmp_path)]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["state", "done", "stopped"]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert {item["name"] for item in json.loads(capsys.readouterr().out)} == {"one", "sync"}
    assert main(["runs", str(tmp_path / "nothing")]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'nothing'}\n"
