"""Which directory a launch works in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainway.config.load import dump_config
from trainway.config.schema import OptimConfig, RunConfig, TrainConfig
from trainway.errors import ConfigError
from trainway.run_dir import RunDir
from trainway.training.runs import (
    changed_settings,
    choose_run_dir,
    list_runs,
    refuse_changed_settings,
    write_status,
)


def config(root: Path, **changes: object) -> RunConfig:
    return RunConfig(runs_dir=str(root), train=TrainConfig(total_steps=10), **changes)


def begin(root: Path, name: str, settings: RunConfig, state: str, age: int) -> RunDir:
    run = RunDir(root / name)
    run.path.mkdir(parents=True)
    run.config.write_text(dump_config(settings))
    os.utime(run.config, (1e9 - age, 1e9 - age))
    write_status(run, state, 5, val_loss=2.5)
    return run


def test_configured_directory_and_name_win(tmp_path: Path) -> None:
    assert choose_run_dir(config(tmp_path, run_dir=str(tmp_path / "here")), "auto").path == tmp_path / "here"
    assert choose_run_dir(config(tmp_path, name="mine"), "auto").path == tmp_path / "mine"


def test_newest_unfinished_run_of_the_same_settings_goes_on(tmp_path: Path) -> None:
    settings = config(tmp_path)
    begin(tmp_path, "older", settings, "stopped", age=30)
    newer = begin(tmp_path, "newer", settings, "failed", age=20)
    begin(tmp_path, "other", config(tmp_path, optim=OptimConfig(lr=1.0)), "stopped", age=10)
    begin(tmp_path, "done", settings, "done", age=0)
    assert choose_run_dir(settings, "auto").path == newer.path
    assert choose_run_dir(settings, "never").path.name.startswith("llama-")


def test_changed_settings_are_named_and_harmless_ones_allowed(tmp_path: Path) -> None:
    run = begin(tmp_path, "run", config(tmp_path), "stopped", age=0)
    assert changed_settings(config(tmp_path, name="renamed"), run) == []
    changed = config(tmp_path, seed=7)
    assert changed_settings(changed, run) == ["seed: 42 -> 7"]
    with pytest.raises(ConfigError, match="seed: 42 -> 7"):
        refuse_changed_settings(changed, run)


def test_a_running_run_without_a_process_was_killed(tmp_path: Path) -> None:
    begin(tmp_path, "run", config(tmp_path), "running", age=0)
    (listed,) = list_runs(tmp_path)
    assert (listed.state, listed.step, listed.val_loss) == ("killed", 5, 2.5)
