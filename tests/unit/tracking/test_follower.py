"""The training's side of a tracker: what it says, and that no process outlives its time."""

from __future__ import annotations

import fcntl
import logging
import signal
import sys
from pathlib import Path

import psutil
import pytest

from trainway.config.schema import TrackingConfig
from trainway.run_dir import RunDir
from trainway.tracking import follower, start_followers
from trainway.tracking.follower import Follower, close_all, start_feed
from trainway.tracking.target import Orders

TALKS = """
import sys, subprocess, time
print('{"say": "open", "where": "here"}', flush=True)
print('{"say": "lost", "why": "no route"}', flush=True)
print('{"say": "back"}', flush=True)
sys.stdin.readline()
open(sys.argv[-2] + "/word", "w").write(sys.stdin.readline())
print('{"say": "complete"}', flush=True)
"""
HANGS = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[-2] + "/child", "w").write(str(child.pid) + "\\n")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("trainway"), "propagate", True)
    caplog.set_level("INFO", logger="trainway")
    return caplog


def instead(path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose trackers are fed by a program of ours."""
    program = path / "program"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(0o755)
    monkeypatch.setattr(follower.sys, "executable", str(program))
    return RunDir(path)


def test_one_warning_when_lost_and_one_when_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    run = instead(tmp_path, TALKS, monkeypatch)
    close_all([Follower("mlflow", run, Orders())], "stopped", 60)
    assert told.messages == [
        "[TRAIN] MLflow: here",
        "warning: MLflow is lost: no route; training goes on, and it gets the rest when it is back",
        "warning: MLflow is back",
    ]
    assert (tmp_path / "word").read_text() == "stopped\n"


def test_what_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a b").mkdir()
    run = instead(tmp_path / "a b", HANGS, monkeypatch)
    feeding = Follower("wandb", run, Orders())
    while not (run.path / "child").exists() or not (run.path / "child").read_text().endswith("\n"):
        assert feeding._process.poll() is None
    child = int((run.path / "child").read_text())
    close_all([feeding], "done", 0)
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=30)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    (said,) = told.messages
    start = "warning: Weights & Biases lacks a part of this run; complete it with: "
    assert said == f"{start}trainway runs sync '{run.path}' --to wandb"


def test_a_process_that_dies_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    feeding = Follower("trackio", instead(tmp_path, "", monkeypatch), Orders())
    feeding._listener.join(60)
    (said,) = told.messages
    start = "warning: what feeds Trackio has ended; training goes on, and after it: "
    assert said == f"{start}trainway runs sync {tmp_path} --to trackio"
    close_all([feeding], "done", 60)


def test_one_that_cannot_be_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower.sys, "executable", str(tmp_path / "missing"))
    assert start_followers(TrackingConfig(report_to=("wandb",)), RunDir(tmp_path), Orders()) == []
    (said,) = told.messages
    assert said.startswith("warning: Weights & Biases is not fed: ") and said.endswith("--to wandb")


def test_it_ends_by_itself_when_the_training_is_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.tracker_lock("wandb").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # it waits for another, as long as it may
        process = start_feed(run, "wandb", Orders(wait_s=0.1))
        assert process.stdin is not None
        process.stdin.close()  # what the kernel does for a training that is gone
        assert process.wait(60) == -signal.SIGKILL
