"""Run directories: the one a launch works in, what state each is in, and the list of them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainway.config.load import config_difference, fingerprint
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.files import atomic_write, read_json
from trainway.planning.arithmetic import count_parameters, padded_vocab_size
from trainway.run_dir import RunDir

Resume = Literal["auto", "never"] | int
State = Literal["new", "running", "stopped", "failed", "done"]


def choose_run_dir(config: RunConfig, resume: Resume) -> RunDir:
    """The directory of this launch: as configured; or the newest unfinished run of the same settings; or a new one.

    The name of a new one tells model, method, settings and time.
    """
    if config.run_dir is not None:
        return RunDir(Path(config.run_dir))
    runs = Path(config.runs_dir)
    if config.name is not None:
        return RunDir(runs / config.name)
    if resume != "never":
        for run in reversed(_by_age(runs)):
            if run_status(run)["state"] != "done" and not changed_settings(config, run):
                return run
    stem = f"{_default_name(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = sum(path.name.startswith(stem) for path in runs.iterdir()) if runs.is_dir() else 0
    return RunDir(runs / (f"{stem}-{taken + 1}" if taken else stem))


def changed_settings(config: RunConfig, run: RunDir) -> list[str]:
    """The settings, as `key: old -> new`, that differ from those the run began with and would change its result."""
    if not run.config.exists():
        return []
    try:
        old = RunConfig.model_validate(yaml.safe_load(run.config.read_text()))
    except ValueError as error:
        return [f"{run.config} is not a configuration of this version: {error}"]
    return config_difference(fingerprint(old), fingerprint(config))


def refuse_changed_settings(config: RunConfig, run: RunDir) -> None:
    """Raise ConfigError when a run would go on with other settings than it began with."""
    if changes := changed_settings(config, run):
        raise ConfigError(
            f"{run.path} was begun with other settings",
            "; ".join(changes),
            "undo the change, choose another run_dir, or say --allow-changes to go on with the new settings",
        )


def write_status(run: RunDir, state: State, step: int, **more: Any) -> None:
    """Record what the run is doing."""
    record = {
        "state": state,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }
    atomic_write(run.status, json.dumps(record, indent=2) + "\n")


def run_status(run: RunDir) -> dict[str, Any]:
    """What `write_status` recorded last; a run that never began is `new`."""
    if not run.status.exists():
        return {"state": "new", "step": 0}
    status: dict[str, Any] = read_json(run.status)
    return status


@dataclass(frozen=True)
class RunSummary:
    """One line of `trainway runs`."""

    name: str
    path: Path
    state: str
    step: int
    val_loss: float | None
    time: str


def list_runs(directory: Path) -> list[RunSummary]:
    """Every run below a directory, oldest first. A run whose process is gone is `killed`, not `running`."""
    from trainway.checkpoint.lock import lock_holder

    found = []
    for run in _by_age(directory):
        status = run_status(run)
        state = status["state"]
        if state == "running" and lock_holder(run) is None:
            state = "killed"
        found.append(
            RunSummary(
                run.path.name, run.path, state, status["step"], status.get("val_loss"), status.get("time", "")
            )
        )
    return found


def _by_age(directory: Path) -> list[RunDir]:
    if not directory.is_dir():
        return []
    runs = [RunDir(path) for path in directory.iterdir() if (path / "config.yaml").exists()]
    return sorted(runs, key=lambda run: (run.config.stat().st_mtime_ns, run.path.name))


def _default_name(config: RunConfig) -> str:
    if config.model.path is not None:
        model = re.sub(r"[^a-z0-9.]+", "-", Path(config.model.path).name.lower()).strip("-")
        method = f"{config.recipe}-lora{config.lora.r}" if config.lora.enabled else config.recipe
        return f"{model}-{method}-lr{config.optim.lr:g}"
    vocab_size = config.model.vocab_size or padded_vocab_size(config.tokenizer.vocab_size)
    total = count_parameters(config.model, vocab_size).total
    size = f"{total / 1e9:.1f}b" if total >= 1e9 else f"{total / 1e6:.0f}m"
    settings = f"{config.optim.name}-lr{config.optim.lr:g}-len{config.train.seq_len}"
    return f"{config.model.architecture}-{size}-{config.recipe}-{settings}"
