"""A model's weights on disk: a Hugging Face directory, or the same in pieces; bit for bit, by name, strict about names."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from trainway.checkpoint.adapter import (
    ADAPTER_STEM,
    adapter_config,
    is_adapter,
    saved_pieces,
    write_adapter_config,
)
from trainway.checkpoint.pieces import (
    WHOLE,
    Part,
    Piece,
    StoredTensors,
    disk_errors,
    open_tensors,
    part_files,
    write_pieces,
    write_tensors,
)
from trainway.errors import DataError
from trainway.files import read_json

MAX_SHARD_SIZE = "5GB"
STEM = "model"
INDEX_FILE = "model.safetensors.index.json"
DISCRIMINATOR_DIR = "discriminator"
"""Directory within a checkpoint that is laid out as the checkpoint is, with the discriminator's files."""

_CURE = "use another checkpoint"


# ---- writing


def write_model(
    model: Any,
    directory: Path,
    tokenizer: Any = None,
    *,
    weights: Mapping[str, Piece] | None = None,
    part: Part = WHOLE,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a transformers model, and its tokenizer, as a directory that `from_pretrained` loads.

    Tied weights are stored once; the configuration names the weights' dtype. Of a model with an adapter only that is
    written, for peft's `from_pretrained`. `weights`: as `saved_pieces` gives them, instead of the model's own. With
    several parts each rank writes its pieces into a file of its own (`assemble` makes a plain directory of them), and
    the first part the configuration and the tokenizer. Raises OSError of the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    adapted = adapter_config(model) is not None
    if weights is None:
        weights = saved_pieces(model, model_pieces(model))
    if not adapted and part.index == 0:
        weights = {**weights, **_persistent_buffers(model)}
    with disk_errors():
        if part.count > 1:
            write_pieces(directory / part.file_name(ADAPTER_STEM if adapted else STEM), weights)
        else:
            tensors = {name: piece.tensor for name, piece in weights.items()}
            if adapted:  # peft knows no shards
                write_tensors(directory / part.file_name(ADAPTER_STEM), tensors, {"format": "pt"})
            else:
                # by the names that they have in memory, whatever the family publishes: `load_model` goes by them
                write_shards(directory, tensors, max_shard_size=max_shard_size)
        if part.index > 0:
            return
        if adapted:
            write_adapter_config(model, directory)
        else:
            _write_config(model, directory, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    # where a model or tokenizer was once loaded from is nobody's business
    for name in ("config.json", "tokenizer_config.json"):
        _drop_origin(directory / name)


def assemble(directory: Path, out: Path, *, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write the pieces in `directory` as plain safetensors into `out`, with one shard in memory at a time.

    Raises DataError for damaged pieces, OSError of the disk.
    """
    with open_tensors(_weight_files(directory)) as stored:
        sizes = {name: torch.empty(shape, device="meta", dtype=stored.dtype(name))
                 for name, shape in stored.shapes.items()}  # fmt: skip
        if is_adapter(directory):
            tensors = {name: stored.read(name) for name in sizes}
            write_tensors(out / WHOLE.file_name(ADAPTER_STEM), tensors, {"format": "pt"})
        else:
            write_shards(
                out, sizes, lambda names: {n: stored.read(n) for n in names}, max_shard_size=max_shard_size
            )


def write_shards(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]] | None = None,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write tensors as `model.safetensors`, or as several such files and their index, into `directory`.

    `read`: gives the tensors of one file at a time, by their names; `tensors` are then their shapes and dtypes, on the
    meta device. Raises OSError of the disk.
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        here = {name: tensors[name] for name in names} if read is None else read(names)
        write_tensors(directory / file, here, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        with disk_errors():
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- reading


def is_in_pieces(directory: Path) -> bool:
    """Whether a model directory was written by several ranks, so that plain transformers cannot load it yet."""
    stem = ADAPTER_STEM if is_adapter(directory) else STEM
    return any(directory.glob(f"{stem}.part-*.safetensors"))


def model_pieces(model: torch.nn.Module) -> dict[str, Piece]:
    """The parameters of a model that is whole, by name; a tied one once."""
    return {name: Piece.whole(parameter) for name, parameter in model.named_parameters()}


def read_model_state(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory, on the CPU; a tied weight appears once.

    Raises DataError if files are missing, damaged, or disagree with the index.
    """
    with open_tensors(_weight_files(directory)) as stored:
        _check_index(directory, stored)
        return {name: stored.read(name) for name in stored.shapes}


def load_model(model: torch.nn.Module, directory: Path, pieces: Mapping[str, Piece] | None = None) -> None:
    """Copy the stored weights into a materialised model, in place, one tensor at a time; an adapter into its adapter.

    `pieces`: what of each parameter is here to be filled; empty means all of it. Values are converted to the dtype of
    the model's tensors. Raises DataError naming every tensor that is missing, unexpected or of another shape; the
    model's content is undefined then.
    """
    targets = _targets(model, model_pieces(model) if pieces is None else pieces)
    with torch.no_grad(), open_tensors(_weight_files(directory)) as stored:
        _check_index(directory, stored)
        problems = [f"{name} is unexpected" for name in stored.shapes.keys() - targets.keys()]
        problems += [
            f"{name} has shape {list(stored.shapes[name])}, the model {list(target.shape)}"
            for name, target in targets.items()
            if stored.shapes.get(name, target.shape) != target.shape
        ]
        found = {id(target.tensor) for name, target in targets.items() if name in stored.shapes}
        problems += [f"{name} is missing" for name, t in targets.items() if id(t.tensor) not in found]
        refuse_problems(f"the weights in {directory} do not fit the model", problems)
        for name in stored.shapes:
            copy_piece(stored, name, targets[name])


def copy_piece(stored: StoredTensors, name: str, target: Piece) -> None:
    """Fill a piece with the elements that belong there."""
    target.tensor.copy_(stored.read_piece(name, target))


def refuse_problems(what: str, problems: list[str]) -> None:
    """Raise a DataError that lists the first of `problems`, or nothing when there are none."""
    if problems:
        problems = sorted(problems)
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError(
            what, "; ".join(problems[:8]) + rest, "check that model and checkpoint belong together"
        )


def _targets(model: torch.nn.Module, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """What is to be filled, by the names that a model directory has for it."""
    if adapter_config(model) is not None:
        return saved_pieces(model, pieces)
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    # tied weights are one object under two names, and one of the names is enough
    return {
        name: pieces[owners[id(tensor)]] if id(tensor) in owners else Piece.whole(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def _weight_files(directory: Path) -> list[Path]:
    if is_adapter(directory):
        return part_files(directory, ADAPTER_STEM)
    places = _index(directory)
    if places is None:
        return part_files(directory, STEM)
    return [directory / file for file in sorted(set(places.values()))]


def _index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DataError(f"{path} is malformed", "it holds no weight_map", _CURE)
    for file in set(places.values()):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise DataError(f"{path} is malformed", f"unsafe file name {file!r:.80}", _CURE)
    return places


def _check_index(directory: Path, stored: StoredTensors) -> None:
    places = _index(directory)
    if places is None:
        return
    found = {name: files[0].name for name, files in stored.files.items()}
    wrong = [f"{name} is missing" for name, file in places.items() if found.get(name) != file]
    wrong += [f"{name} is not in the index" for name in found.keys() - places.keys()]
    refuse_problems(f"{directory} does not match its index", wrong)


# ---- writing files


def _persistent_buffers(model: torch.nn.Module) -> dict[str, Piece]:
    """What a model stores beside its parameters, such as the biases of a router; every rank has all of it."""
    # not by `state_dict`: under FSDP that reshards the model, and only this rank would
    return {
        f"{prefix}.{name}" if prefix else name: Piece.whole(buffer)
        for prefix, owner in model.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    }


def _write_config(model: Any, directory: Path, weights: Mapping[str, Piece]) -> None:
    # not by the model's `save_pretrained`: that imports every launcher that is installed, and DeepSpeed speaks on stdout
    config = copy.deepcopy(model.config)
    # a model that computes in bf16 may be saved as the fp32 weights that its optimiser keeps
    config.dtype = functools.reduce(torch.promote_types, {piece.tensor.dtype for piece in weights.values()})
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def _drop_origin(path: Path) -> None:
    if not path.exists():
        return
    fields = read_json(path)
    kept = {key: value for key, value in fields.items() if key not in ("_name_or_path", "name_or_path")}
    if kept != fields:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
