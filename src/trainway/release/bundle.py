"""A run's checkpoint → a directory that plain transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainway.checkpoint.snapshot import MODEL_DIR
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import assemble, is_in_pieces
from trainway.errors import ConfigError
from trainway.files import atomic_directory
from trainway.run_dir import RunDir


def export(run: str | Path, out: str | Path, *, which: str | int = "best") -> Path:
    """Copy the model and tokenizer of a verified checkpoint into the new directory `out`.

    Args:
        which: `best`, `latest`, or a step.

    Raises:
        ConfigError: no run or no such checkpoint there (the message lists those that exist), or `out` exists.
        DataError: the checkpoint is damaged.
    """
    run_dir, out = RunDir(Path(run)), Path(out)
    if not run_dir.checkpoints.is_dir():
        raise ConfigError(
            f"{run} holds no checkpoints",
            "it is not a run directory, or nothing was saved yet",
            "`trainway runs` lists the runs",
        )
    if out.exists():
        raise ConfigError(
            f"{out} exists already", "an export never overwrites", "choose another --out, or remove it first"
        )
    source = CheckpointStore(run_dir.checkpoints, keep_last=1).resolve(which) / MODEL_DIR
    in_pieces = is_in_pieces(source)
    with atomic_directory(out) as partial:
        weights = shutil.ignore_patterns("*.safetensors") if in_pieces else None
        shutil.copytree(source, partial, dirs_exist_ok=True, ignore=weights)
        if in_pieces:
            assemble(source, partial)
    return out


def model_directory(target: str | Path) -> Path:
    """Where the model of a run directory (its best checkpoint), a checkpoint, or a model directory lies.

    Raises:
        ConfigError: none of these is there.
    """
    target = Path(target)
    if (target / "config.json").exists():
        return target
    if (target / MODEL_DIR / "config.json").exists():
        return target / MODEL_DIR
    if RunDir(target).checkpoints.is_dir():
        checkpoints = CheckpointStore(RunDir(target).checkpoints, keep_last=1)
        which = "best" if (checkpoints.directory / "best").exists() else "latest"
        return checkpoints.resolve(which) / MODEL_DIR
    raise ConfigError(
        f"{target} holds no model",
        "it is neither a run directory, nor a checkpoint, nor a directory with a config.json",
        "`trainway runs` lists the runs",
    )
