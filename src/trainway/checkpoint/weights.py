"""Weights and optimiser state as safetensors files: bit for bit, by name, and strict about every name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainway.errors import DataError
from trainway.files import read_json

MAX_SHARD_SIZE = "5GB"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_CURE = "use another checkpoint"

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


# ---- model


def write_model(
    model: Any, directory: Path, tokenizer: Any = None, *, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write a transformers model, and its tokenizer, as a directory that `from_pretrained` loads.

    Tied weights are stored once; the configuration names the weights' dtype. Raises OSError of the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _disk_errors(), _quiet():
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    # where a model or tokenizer was once loaded from is nobody's business
    for name in ("config.json", "tokenizer_config.json"):
        _drop_origin(directory / name)


def read_model_state(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory, on the CPU; a tied weight appears once.

    Raises DataError if files are missing, damaged, or disagree with the index.
    """
    return dict(_stored_tensors(directory))


def load_model(model: torch.nn.Module, directory: Path) -> None:
    """Copy the stored weights into a materialised model, in place, one tensor at a time.

    Values are converted to the dtype of the model's tensors. Raises DataError naming every tensor that is missing,
    unexpected or of another shape; the model's content is undefined then.
    """
    targets = model.state_dict(keep_vars=True)
    loaded: set[int] = set()
    problems: list[str] = []
    with torch.no_grad():
        for name, tensor in _stored_tensors(directory):
            target = targets.get(name)
            if target is None:
                problems.append(f"{name} is unexpected")
            elif target.shape != tensor.shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, the model {list(target.shape)}")
                loaded.add(id(target))
            else:
                target.copy_(tensor)
                loaded.add(id(target))
    # tied weights are one object under two names, and one of the names is enough
    problems += [f"{name} is missing" for name, target in targets.items() if id(target) not in loaded]
    _refuse_problems(f"the weights in {directory} do not fit the model", problems)


# ---- tensors


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors from any device. Raises OSError of the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors():
        save_file(_unshared(tensors), str(path), metadata=dict(metadata) if metadata else None)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that `write_tensors` wrote, on the CPU. Raises DataError if the file is missing or damaged."""
    return dict(_tensors_of(path))


# ---- optimiser


def write_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], named_parameters: NamedParameters, path: Path
) -> None:
    """Write the state of optimisers as `<class>/<parameter name>/<key>`, whatever their groups are.

    Hyper-parameters are not stored: the configuration is their home. Raises OSError of the disk.
    """
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    for slot, optimizer, parameter in _slots(optimizers, named_parameters):
        scalars: dict[str, Any] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if "/" in key:
                raise TypeError(f"the key {key!r} of {slot} holds a slash")
            if isinstance(value, torch.Tensor):
                tensors[f"{slot}/{key}"] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                scalars[key] = value
            else:
                raise TypeError(f"{slot}/{key} is neither a tensor nor a scalar but {type(value).__name__}")
        keys = sorted(key for key in optimizer.state.get(parameter, {}) if key not in scalars)
        layout[slot] = {"shape": list(parameter.shape), "tensors": keys, "scalars": scalars}
    write_tensors(path, tensors, {"layout": json.dumps(layout)})


def read_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], named_parameters: NamedParameters, path: Path
) -> None:
    """Put the written state into optimisers, bit for bit; their state may be empty, their groups different.

    Raises DataError naming every parameter that is missing, unexpected or of another shape, and for a damaged file;
    the optimisers are untouched then.
    """
    slots = {
        slot: (optimizer, parameter) for slot, optimizer, parameter in _slots(optimizers, named_parameters)
    }
    layout = _read_layout(path)
    problems = [f"{slot} is missing" for slot in slots.keys() - layout.keys()]
    problems += [f"{slot} is unexpected" for slot in layout.keys() - slots.keys()]
    problems += [
        f"{slot} has shape {layout[slot]['shape']}, the model {list(parameter.shape)}"
        for slot, (_, parameter) in slots.items()
        if slot in layout and layout[slot]["shape"] != list(parameter.shape)
    ]
    _refuse_problems(f"the optimiser state in {path} does not fit the run", problems)

    expected = {f"{slot}/{key}" for slot, entry in layout.items() for key in entry["tensors"]}
    states: dict[str, dict[str, Any]] = {slot: dict(entry["scalars"]) for slot, entry in layout.items()}
    for name, tensor in _tensors_of(path):
        if name not in expected:
            problems.append(f"{name} is unexpected")
            continue
        expected.discard(name)
        slot, _, key = name.rpartition("/")
        states[slot][key] = _placed(key, tensor, *slots[slot])
    problems += [f"{name} is missing" for name in expected]
    _refuse_problems(f"the optimiser state in {path} is incomplete", problems)

    for slot, (optimizer, parameter) in slots.items():
        optimizer.state.pop(parameter, None)
        if states[slot]:
            optimizer.state[parameter] = states[slot]


# ---- reading files


def _stored_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if not (directory / INDEX_FILE).exists():
        yield from _tensors_of(directory / SINGLE_FILE)
        return
    index = read_json(directory / INDEX_FILE)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DataError(f"{directory / INDEX_FILE} is malformed", "it holds no weight_map", _CURE)
    for file in sorted(set(places.values())):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise DataError(f"{directory / INDEX_FILE} is malformed", f"unsafe file name {file!r:.80}", _CURE)
        stored = set()
        for name, tensor in _tensors_of(directory / file):
            stored.add(name)
            yield name, tensor
        listed = {name for name, place in places.items() if place == file}
        wrong = [f"{name} is missing" for name in listed - stored]
        wrong += [f"{name} is not in the index" for name in stored - listed]
        _refuse_problems(f"{directory / file} does not match its index", wrong)


def _tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors one at a time, so that no second copy of the whole file is in memory."""
    with _opened(path) as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _read_layout(path: Path) -> dict[str, dict[str, Any]]:
    with _opened(path) as file:
        text = (file.metadata() or {}).get("layout")
    try:
        layout = json.loads(text or "")
        entries = list(layout.values())
        good = all(
            entry.keys() == {"shape", "tensors", "scalars"}
            and isinstance(entry["shape"], list)
            and isinstance(entry["tensors"], list)
            and isinstance(entry["scalars"], dict)
            for entry in entries
        )
    except (ValueError, AttributeError, RecursionError):
        good = False
    if not good:
        raise DataError(f"{path} holds no optimiser state", "its layout is missing or malformed", _CURE)
    return layout


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", fix=_CURE) from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read", f"{error}", _CURE) from error


def _refuse_problems(what: str, problems: list[str]) -> None:
    if problems:
        problems = sorted(problems)
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError(
            what, "; ".join(problems[:8]) + rest, "check that model and checkpoint belong together"
        )


# ---- optimiser slots


def _slots(
    optimizers: Iterable[torch.optim.Optimizer], named_parameters: NamedParameters
) -> Iterator[tuple[str, torch.optim.Optimizer, torch.nn.Parameter]]:
    """Every parameter that an optimiser holds, as `<class>/<parameter name>`."""
    names = {id(parameter): name for name, parameter in named_parameters}
    seen = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                slot = f"{type(optimizer).__name__}/{names[id(parameter)]}"
                assert slot not in seen, f"two optimisers of one class hold {slot}"
                seen.add(slot)
                yield slot, optimizer, parameter


def _placed(
    key: str, tensor: torch.Tensor, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter
) -> torch.Tensor:
    """A tensor of its own (not a view of the file) on the device where the optimiser wants it."""
    device = parameter.device
    if key == "step" and tensor.ndim == 0:
        # torch keeps the step count on the CPU unless a kernel reads it
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        if not (group.get("fused") or group.get("capturable")):
            device = torch.device("cpu")
    if tensor.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tensor.dtype, device=device, requires_grad=False).copy_(
            tensor
        )
    return tensor.to(device, copy=True)


# ---- writing files


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[tuple[str, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        if storage in seen:
            tensor = tensor.clone()  # safetensors refuses two tensors that share memory
        seen.add(storage)
        result[name] = tensor
    return result


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Give safetensors' own error of a full or failing disk the type that every other writer raises."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), str(error)) from error
        raise


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
