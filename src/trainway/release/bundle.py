"""A run's checkpoint → a directory that plain transformers loads, or plain peft where it is an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from transformers import AutoTokenizer

from trainway.checkpoint.adapter import ADAPTER_CONFIG, is_adapter
from trainway.checkpoint.snapshot import MODEL_DIR
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import DISCRIMINATOR_DIR, assemble, is_in_pieces, write_model
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.files import atomic_directory
from trainway.run_dir import RunDir

if TYPE_CHECKING:
    from trainway.models.base import BaseModel


def export(
    run: str | Path,
    out: str | Path,
    *,
    which: str | int = "best",
    merge: bool = False,
    part: Literal["model", "discriminator"] = "model",
) -> Path:
    """Copy the model and tokenizer of a verified checkpoint into the new directory `out`.

    Args:
        which: `best`, `latest`, or a step.
        merge: write one plain model, the adapter of the run merged into its base, instead of the adapter.
        part: what the run is for, or its discriminator: a reward model for `AutoModelForSequenceClassification`, or an
            adapter for peft; there the base model's pad_token_id is to be set to the tokenizer's.

    Raises:
        ConfigError: no run or no such checkpoint there (the message lists those that exist), `out` exists, there is
            nothing to merge, or no discriminator.
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
    checkpoint = CheckpointStore(run_dir.checkpoints, keep_last=1).resolve(which)
    source = checkpoint / MODEL_DIR
    if part == "discriminator":
        source = checkpoint / DISCRIMINATOR_DIR / MODEL_DIR
        if not source.is_dir():
            raise ConfigError(
                f"{checkpoint} holds no discriminator",
                "recipe gad alone trains one, and not in its stage seqkd",
                "export the model, or choose another run",
            )
    if merge:
        return _export_merged(source, out, RunDir(Path(run)))
    with atomic_directory(out) as partial:
        publish(source, partial)
    return out


def publish(source: Path, out: Path) -> None:
    """Copy a checkpoint's model directory into `out`, in one piece and by the names of its family.

    Raises DataError for damaged weights, OSError of the disk; `out` is half written then.
    """
    from trainway.models.published import publish_names  # transformers takes its time

    in_pieces = is_in_pieces(source)
    weights = shutil.ignore_patterns("*.safetensors") if in_pieces else None
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=weights)
    if in_pieces:
        assemble(source, out)
    publish_names(out)


def model_directory(target: str | Path) -> Path:
    """Where the model of a run directory (its best checkpoint), a checkpoint, or a model directory lies.

    Raises:
        ConfigError: none of these is there.
    """
    target = Path(target)
    for directory in (target, target / MODEL_DIR):
        if any((directory / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
            return directory
    if RunDir(target).checkpoints.is_dir():
        checkpoints = CheckpointStore(RunDir(target).checkpoints, keep_last=1)
        which = "best" if (checkpoints.directory / "best").exists() else "latest"
        return checkpoints.resolve(which) / MODEL_DIR
    raise ConfigError(
        f"{target} holds no model",
        "it is neither a run directory, nor a checkpoint, nor a directory with a config.json",
        "`trainway runs` lists the runs",
    )


def adapter_base(directory: Path) -> BaseModel:
    """The base of the adapter in `directory`, which may be part of a run: its settings say where imports are kept.

    Raises:
        ConfigError, DataError, EnvironmentFault: the base was not found, or is damaged.
    """
    from trainway.models.merge import find_adapter_base  # peft takes its time

    depth = 3 if directory.resolve().parent.name == DISCRIMINATOR_DIR else 2
    run = directory.resolve().parents[depth : depth + 1]  # run/checkpoints/step-N/[discriminator/]model
    found = RunDir(run[0]).config if run and directory.name == MODEL_DIR else None
    settings = yaml.safe_load(found.read_text()) if found is not None and found.exists() else {}
    config = RunConfig.model_validate(settings)
    cache, trusted = Path(config.data.store_dir), config.model.trust_remote_code
    return find_adapter_base(directory, cache=cache, trust_remote_code=trusted)


def _export_merged(source: Path, out: Path, run: RunDir) -> Path:
    from trainway.models.merge import load_adapted, merge_adapters
    from trainway.models.published import publish_names

    if not is_adapter(source):
        raise ConfigError(
            f"{run.path} has no adapter to merge", "it trained the whole model", "leave --merge out"
        )
    base = adapter_base(source)
    model = load_adapted(source, base, base.dtype)
    merge_adapters(model)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if source.parent.name == DISCRIMINATOR_DIR:
        # by which transformers finds a sequence's last token
        model.config.pad_token_id = tokenizer.pad_token_id
    with atomic_directory(out) as partial:
        write_model(model, partial, tokenizer)
        publish_names(partial)
    return out
