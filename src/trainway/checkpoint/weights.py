"""A model's weights on disk: a Hugging Face directory, or the same in pieces; bit for bit, by name, strict about names."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

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

    Tied weights are stored once; the configuration names the weights' dtype. `weights`: by parameter name, instead of
    the model's own. With several parts each rank writes its pieces into a file of its own (`assemble` makes a plain
    directory of them), and the first part the configuration and the tokenizer. Raises OSError of the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with disk_errors(), _quiet():
        if part.count == 1:
            state = None if weights is None else {name: piece.tensor for name, piece in weights.items()}
            model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
        else:
            assert weights is not None
            write_pieces(directory / part.file_name(STEM), weights)
        if part.index > 0:
            return
        if part.count > 1:
            _write_config(model, directory)
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
        sizes = {name: torch.empty(shape, device="meta", dtype=_dtype(stored, name))
                 for name, shape in stored.shapes.items()}  # fmt: skip
        plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
        for file, names in plan.filename_to_tensors.items():
            write_tensors(out / file, {name: stored.read(name) for name in names}, {"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---- reading


def is_in_pieces(directory: Path) -> bool:
    """Whether a model directory was written by several ranks, so that plain transformers cannot load it yet."""
    return any(directory.glob(f"{STEM}.part-*.safetensors"))


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
    """Copy the stored weights into a materialised model, in place, one tensor at a time.

    `pieces`: what of each parameter is here to be filled; empty means all of it. Values are converted to the dtype of
    the model's tensors. Raises DataError naming every tensor that is missing, unexpected or of another shape; the
    model's content is undefined then.
    """
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    pieces = model_pieces(model) if pieces is None else pieces
    # tied weights are one object under two names, and one of the names is enough
    targets = {
        name: pieces[owners[id(tensor)]] if id(tensor) in owners else Piece.whole(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
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
    """Fill a piece with the rows that belong there."""
    rows = None if target.is_whole else target.tensor.shape[0]
    target.tensor.copy_(stored.read(name, target.start, rows))


def refuse_problems(what: str, problems: list[str]) -> None:
    """Raise a DataError that lists the first of `problems`, or nothing when there are none."""
    if problems:
        problems = sorted(problems)
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError(
            what, "; ".join(problems[:8]) + rest, "check that model and checkpoint belong together"
        )


def _weight_files(directory: Path) -> list[Path]:
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


def _dtype(stored: StoredTensors, name: str) -> torch.dtype:
    return stored.read(name, 0, 0).dtype if stored.shapes[name] else stored.read(name).dtype


def _write_config(model: Any, directory: Path) -> None:
    """As `save_pretrained` writes it, without the weights."""
    config = copy.deepcopy(model.config)
    config.dtype = next(model.parameters()).dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    # a progress bar per checkpoint would tear the training's own
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _drop_origin(path: Path) -> None:
    if not path.exists():
        return
    fields = read_json(path)
    kept = {key: value for key, value in fields.items() if key not in ("_name_or_path", "name_or_path")}
    if kept != fields:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
