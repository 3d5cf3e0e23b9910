"""Where DeepSpeed keeps what of each parameter: this rank's intervals of fp32 weights and of optimiser state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.checkpoint.pieces import Piece
from trainway.engines.world import World
from trainway.errors import DataError


@dataclass(frozen=True)
class _Interval:
    """The elements of one parameter within one of DeepSpeed's flat tensors; there may be none."""

    flat: Tensor
    """What the optimiser updates, and the key of its state."""
    offset: int
    piece: Piece


@dataclass
class NewState:
    """Room for optimiser states that are being read: flat, as DeepSpeed's weights are."""

    intervals: dict[int, _Interval]
    """By id of a piece's tensor."""
    flat: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By id of a flat tensor of weights, then by key."""

    def room(self, piece: Piece, key: str, dtype: torch.dtype) -> Tensor:
        """The part of a flat state that belongs to a piece, in its shape; what is behind its end is 0."""
        interval = self.intervals[id(piece.tensor)]
        states = self.flat.setdefault(id(interval.flat), {})
        if key not in states:
            states[key] = torch.zeros_like(interval.flat, dtype=dtype, requires_grad=False)
        return _cut(states[key], interval)


class ZeroParts:
    """The intervals that this rank holds, by parameter name, and the way between them and DeepSpeed's tensors."""

    def __init__(self, zero: Any, model: PreTrainedModel, world: World, *, sharded: bool) -> None:
        """`zero`: DeepSpeed's optimiser; `sharded`: its stage is 3."""
        self._zero, self._sharded, self._world = zero, sharded, world
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        find = _intervals_of_stage_3 if sharded else _intervals_of_stage_2
        self._intervals = {names[key]: interval for key, interval in find(zero, world).items()}
        self.pieces: dict[str, Piece] = {}
        """Every parameter, as it is to be filled: fp32 intervals, and what is frozen in its own type."""
        for name, parameter in model.named_parameters():
            if name in self._intervals:
                self.pieces[name] = self._intervals[name].piece
            elif sharded:
                self.pieces[name] = _piece(parameter.ds_tensor.detach(), 0, parameter, world)
            else:
                self.pieces[name] = Piece.whole(parameter.detach())

    def written(self) -> dict[str, Piece]:
        """The pieces that this rank writes: together the ranks' make up every parameter once."""
        ranks, rank = self._world.world_size, self._world.rank

        def own(name: str, piece: Piece) -> Piece:
            if self._sharded or name in self._intervals or ranks == 1:
                return piece
            # frozen, and whole on every rank
            size = piece.tensor.numel()
            chunk = -(-size // ranks)
            start = min(rank * chunk, size)
            return Piece(piece.tensor.reshape(-1)[start : start + chunk], piece.shape, start)

        return {name: own(name, piece) for name, piece in self.pieces.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 weights to those that the model computes with, and gather what is gathered at all times."""
        zero = self._zero
        if not self._sharded:
            zero.update_lp_params()
            return
        zero.parameter_offload.partition_all_parameters()  # what is gathered is gathered again when it is used
        for flat, weights in zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        ):
            weights.data.copy_(flat.data)

    def view_state(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        """An optimiser of the same class that holds the intervals instead, its state views of the flat one's."""
        view = torch.optim.AdamW([interval.piece.tensor for interval in self._intervals.values()])
        if optimizer is None:
            return view
        for interval in self._intervals.values():
            view.state[interval.piece.tensor] = {
                key: _cut(value, interval) if value.shape == interval.flat.shape else value
                for key, value in optimizer.state.get(interval.flat, {}).items()
            }
        return view

    def new_state(self) -> NewState:
        return NewState({id(interval.piece.tensor): interval for interval in self._intervals.values()})

    def take_state(
        self, optimizer: torch.optim.Optimizer, view: torch.optim.Optimizer, states: NewState, where: str
    ) -> None:
        """Give `optimizer` the flat states that were read, and the rest of what `view` got with them.

        Raises DataError when parameters that share a flat tensor have been updated at different times.
        """
        optimizer.state.clear()
        for interval in self._intervals.values():
            state = view.state.get(interval.piece.tensor, {})
            flat = states.flat.get(id(interval.flat), {})
            rest = {key: value for key, value in state.items() if key not in flat}
            known = optimizer.state.setdefault(interval.flat, {**rest, **flat})
            if known.keys() != state.keys() or any(known[key] != value for key, value in rest.items()):
                raise DataError(
                    f"the optimiser state in {where} does not fit DeepSpeed",
                    "its parameters were not updated equally often, and DeepSpeed counts for all of them at once",
                    "go on with engine.name=fsdp",
                )
        for flat_weights, state in list(optimizer.state.items()):
            if not state:
                del optimizer.state[flat_weights]


def partition(deepspeed: Any, module: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Cut every parameter of `module`, on the meta device, as stage 3 does; one at a time is whole for a moment.

    Their values are left open. Buffers are moved to `device`.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((owner, name))
                parameters[id(parameter)] = parameter
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else buffer.to(device)
    first: Any = None
    for key, parameter in parameters.items():
        room = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
        for owner, name in owners[key]:
            owner._parameters[name] = room
        if first is None:
            deepspeed.zero.Init(nn.ParameterList([room]), config_dict_or_path=settings, dtype=parameter.dtype)
            first = room
        else:
            first.convert_to_zero_parameters(param_list=[room])


def _intervals_of_stage_2(zero: Any, world: World) -> dict[int, _Interval]:
    found = {}
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping  # None: no element of it is in this rank's partition
            start = mapping.lp_fragment_address.start if mapping else 0
            count = mapping.lp_fragment_address.numel if mapping else 0
            offset = mapping.hp_fragment_address.start if mapping else 0
            elements = flat.detach()[offset : offset + count]
            piece = _shaped(elements, tuple(parameter.shape), start)
            found[id(parameter)] = _Interval(flat, offset, _trained(piece))
    return found


def _intervals_of_stage_3(zero: Any, world: World) -> dict[int, _Interval]:
    found = {}
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            piece = _piece(flat.detach(), offset, parameter, world)
            found[id(parameter)] = _Interval(flat, offset, _trained(piece))
            offset += parameter.partition_numel()
    return found


def _piece(flat: Tensor, offset: int, parameter: Any, world: World) -> Piece:
    """What of a parameter cut by stage 3 lies in `flat` at `offset`; the last ranks' shares end in padding."""
    share = parameter.partition_numel()
    start = min(world.rank * share, parameter.ds_numel)
    count = min(share, parameter.ds_numel - start)
    return _shaped(flat[offset : offset + count], tuple(parameter.ds_shape), start)


def _shaped(elements: Tensor, shape: tuple[int, ...], start: int) -> Piece:
    whole = elements.numel() == torch.Size(shape).numel()
    return Piece(elements.view(shape) if whole else elements, shape, start)


def _trained(piece: Piece) -> Piece:
    piece.tensor.requires_grad_()  # tells it from one that is frozen, as under every engine
    return piece


def _cut(flat: Tensor, interval: _Interval) -> Tensor:
    tensor = interval.piece.tensor
    return flat[interval.offset : interval.offset + tensor.numel()].view(tensor.shape)
