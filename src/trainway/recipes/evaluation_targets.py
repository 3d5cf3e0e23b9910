"""Which models an evaluation is of: the checkpoints of runs, and directories with a model or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainway.checkpoint.adapter import ADAPTER_CONFIG, is_adapter
from trainway.checkpoint.snapshot import MODEL_DIR
from trainway.checkpoint.store import CheckpointStore
from trainway.config.schema import RunConfig
from trainway.files import hash_file, read_json
from trainway.release.bundle import adapter_base, model_directory
from trainway.run_dir import RunDir

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, and the run that it is from, if any."""

    name: str
    directory: Path
    run: RunDir | None = None
    step: int | None = None
    config: RunConfig | None = None


def chosen_models(target: str | Path, which: Sequence[str | int]) -> list[EvaluatedModel]:
    """The models that `target` stands for: of a run the checkpoints that `which` names, the best one without a word.

    Raises:
        ConfigError: no model there, or no such checkpoint.
        DataError: a checkpoint is damaged.
    """
    path = Path(target)
    run = RunDir(path)
    if not run.checkpoints.is_dir():
        return [_of_checkpoint(str(target), model_directory(path))]
    store = CheckpointStore(run.checkpoints, keep_last=1)
    asked: list[str | int] = list(which) or ["best" if (run.checkpoints / "best").exists() else "latest"]
    if "all" in asked:
        asked = list(store.steps()) or ["latest"]
    found = list(dict.fromkeys(store.resolve(one) for one in asked))
    several = len(found) > 1
    config = _run_config(run)
    models = []
    for checkpoint in found:
        step = int(checkpoint.name.removeprefix("step-"))
        name = f"{target} step {step}" if several else str(target)
        models.append(EvaluatedModel(name, checkpoint / MODEL_DIR, run, step, config))
    return models


def tokenizer_of(directory: Path) -> tuple[Path, str]:
    """Where the tokenizer of a model lies, of an adapter maybe with its base; and the hashes of its files."""
    beside = (directory / "tokenizer_config.json").exists() or not is_adapter(directory)
    home = directory if beside else adapter_base(directory).directory
    return home, "-".join(hash_file(home / name) for name in TOKENIZER_FILES if (home / name).is_file())


def base_of(directory: Path) -> dict[str, Any]:
    """Of an adapter: the model that it was trained on."""
    if not is_adapter(directory):
        return {}
    config = read_json(directory / ADAPTER_CONFIG)
    return {"base": config.get("base_model_name_or_path"), "base_revision": config.get("revision")}


def _of_checkpoint(name: str, directory: Path) -> EvaluatedModel:
    """A model directory, which may be that of a run's checkpoint."""
    checkpoint = directory.resolve().parent
    run = RunDir(checkpoint.parent.parent)
    step = checkpoint.name.removeprefix("step-")
    if directory.name != MODEL_DIR or checkpoint.parent.name != run.checkpoints.name or not step.isdecimal():
        return EvaluatedModel(name, directory)
    verified = CheckpointStore(run.checkpoints, keep_last=1).resolve(int(step))
    return EvaluatedModel(name, verified / MODEL_DIR, run, int(step), _run_config(run))


def _run_config(run: RunDir) -> RunConfig | None:
    if not run.config.exists():
        return None
    return RunConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8")))
