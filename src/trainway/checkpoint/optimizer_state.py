"""The state of optimisers as safetensors: by class and parameter name, whatever the groups and the sharding are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainway.checkpoint.pieces import (
    WHOLE,
    Part,
    Piece,
    StoredTensors,
    open_tensors,
    part_files,
    write_pieces,
)
from trainway.checkpoint.weights import refuse_problems
from trainway.errors import DataError

STEM = "optimizer"

Room = Callable[[Piece, str, torch.dtype], torch.Tensor]
"""Gives the tensor that a piece's state of a name is to be read into; it has the piece's shape."""


@dataclass(frozen=True)
class Slot:
    """What an optimiser keeps for one parameter, of which this rank may hold only a piece."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    tensors: dict[str, Piece]
    scalars: dict[str, Any]


def optimizer_slots(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, Piece]
) -> dict[str, Slot]:
    """The state of optimisers by `<class>/<parameter name>`; its tensors are the live ones.

    `parameters`: the tensors that the optimisers hold, by name. Hyper-parameters are left out: the configuration is
    their home.
    """
    slots = {}
    for name, optimizer, piece in _named(optimizers, parameters):
        tensors: dict[str, Piece] = {}
        scalars: dict[str, Any] = {}
        for key, value in optimizer.state.get(piece.tensor, {}).items():
            if "/" in key:
                raise TypeError(f"the key {key!r} of {name} holds a slash")
            if isinstance(value, torch.Tensor):
                tensors[key] = piece.like(value) if value.shape == piece.tensor.shape else Piece.whole(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                scalars[key] = value
            else:
                raise TypeError(f"{name}/{key} is neither a tensor nor a scalar but {type(value).__name__}")
        slots[name] = Slot(piece.shape, tensors, scalars)
    return slots


def write_optimizer(slots: Mapping[str, Slot], directory: Path, part: Part = WHOLE) -> None:
    """Write this rank's part of the optimisers' state. Raises OSError of the disk."""
    layout = {
        name: {"shape": list(slot.shape), "tensors": sorted(slot.tensors), "scalars": slot.scalars}
        for name, slot in slots.items()
    }
    pieces = {f"{name}/{key}": piece for name, slot in slots.items() for key, piece in slot.tensors.items()}
    if part.index > 0:
        # what is not cut as its parameter is, such as a count of steps, is the same on every rank
        cut = {f"{name}/{key}" for name, slot in slots.items()
               for key, piece in slot.tensors.items() if piece.shape == slot.shape}  # fmt: skip
        pieces = {key: piece for key, piece in pieces.items() if key in cut}
    write_pieces(directory / part.file_name(STEM), pieces, {"layout": layout})


def read_optimizer(
    optimizers: Iterable[torch.optim.Optimizer],
    parameters: Mapping[str, Piece],
    directory: Path,
    room: Room | None = None,
) -> None:
    """Put the written state into optimisers, bit for bit; their state may be empty, their groups different.

    `room`: where tensors that are cut as their parameter lie; empty makes them.
    Raises DataError naming every parameter that is missing, unexpected or of another shape, and for a damaged file;
    the optimisers are untouched then.
    """
    slots = {name: (optimizer, piece) for name, optimizer, piece in _named(optimizers, parameters)}
    with open_tensors(part_files(directory, STEM)) as stored:
        layout = _read_layout(stored, directory)
        problems = [f"{name} is missing" for name in slots.keys() - layout.keys()]
        problems += [f"{name} is unexpected" for name in layout.keys() - slots.keys()]
        problems += [
            f"{name} has shape {layout[name]['shape']}, the model {list(piece.shape)}"
            for name, (_, piece) in slots.items()
            if name in layout and layout[name]["shape"] != list(piece.shape)
        ]
        refuse_problems(f"the optimiser state in {directory} does not fit the run", problems)
        expected = {f"{name}/{key}" for name, entry in layout.items() for key in entry["tensors"]}
        problems = [f"{name} is unexpected" for name in stored.shapes.keys() - expected]
        problems += [f"{name} is missing" for name in expected - stored.shapes.keys()]
        refuse_problems(f"the optimiser state in {directory} is incomplete", problems)

        states: dict[str, dict[str, Any]] = {}
        for name, entry in layout.items():
            optimizer, piece = slots[name]
            states[name] = dict(entry["scalars"])
            for key in entry["tensors"]:
                states[name][key] = _placed(stored, f"{name}/{key}", key, optimizer, piece, room)
    for name, (optimizer, piece) in slots.items():
        optimizer.state.pop(piece.tensor, None)
        if states[name]:
            optimizer.state[piece.tensor] = states[name]


def _named(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, Piece]
) -> Iterator[tuple[str, torch.optim.Optimizer, Piece]]:
    """Every parameter that an optimiser holds, as `<class>/<parameter name>`."""
    names = {id(piece.tensor): name for name, piece in parameters.items()}
    seen = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                slot = f"{type(optimizer).__name__}/{names[id(parameter)]}"
                assert slot not in seen, f"two optimisers of one class hold {slot}"
                seen.add(slot)
                yield slot, optimizer, parameters[names[id(parameter)]]


def _read_layout(stored: StoredTensors, directory: Path) -> dict[str, dict[str, Any]]:
    try:
        layout: dict[str, dict[str, Any]] = stored.facts[0]["layout"]
        good = all(
            entry.keys() == {"shape", "tensors", "scalars"}
            and isinstance(entry["shape"], list)
            and isinstance(entry["tensors"], list)
            and isinstance(entry["scalars"], dict)
            for entry in layout.values()
        )
    except (KeyError, AttributeError):
        good = False
    if not good:
        raise DataError(
            f"{directory} holds no optimiser state",
            "its layout is missing or malformed",
            "use another checkpoint",
        )
    return layout


def _placed(
    stored: StoredTensors,
    name: str,
    key: str,
    optimizer: torch.optim.Optimizer,
    piece: Piece,
    room: Room | None,
) -> torch.Tensor:
    """A tensor of its own (not a view of the file) on the device where the optimiser wants it."""
    parameter = piece.tensor
    device = parameter.device
    if key == "step" and not stored.shapes[name]:
        # torch keeps the step count on the CPU unless a kernel reads it
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        if not (group.get("fused") or group.get("capturable")):
            device = torch.device("cpu")
    if stored.shapes[name] != piece.shape:
        return stored.read(name).to(device, copy=True)
    tensor = stored.read_piece(name, piece)
    if room is not None:
        return room(piece, key, tensor.dtype).copy_(tensor)
    return torch.empty_like(parameter, dtype=tensor.dtype, device=device, requires_grad=False).copy_(tensor)
