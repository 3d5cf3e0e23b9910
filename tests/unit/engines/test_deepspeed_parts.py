"""Where DeepSpeed's partitions lie: together the ranks hold every element once, and none of the padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainway.engines.world import World
from trainway.engines.zero_parts import ZeroParts
from trainway.errors import DataError

PADDING = -1.0
SHAPES = {"a": (5, 3), "b": (2,), "c": (1, 7)}


def rank_of(rank: int, count: int) -> World:
    return World(rank, rank, count, count, torch.device("cpu"))


def whole(name: str) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32) + 100 * ord(name)


class Model:
    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> list[tuple[str, Any]]:
        return list(self._parameters.items())


def stage_3(rank: int, count: int, frozen: str = "") -> ZeroParts:
    """Each parameter cut into equal shares, the last ones padded; those of a rank one after another."""
    parameters, shares = {}, {}
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        share = -(-size // count)
        padded = torch.cat([whole(name), torch.full((share * count - size,), PADDING)])
        shares[name] = padded[rank * share : (rank + 1) * share].clone()
        parameters[name] = SimpleNamespace(
            ds_numel=size, ds_shape=shape, ds_tensor=shares[name], partition_numel=lambda n=share: n
        )
    trained = [name for name in SHAPES if name != frozen]
    flat = torch.cat([shares[name] for name in trained]).requires_grad_()
    zero = SimpleNamespace(
        fp16_groups=[[parameters[name] for name in trained]], fp32_partitioned_groups_flat=[flat]
    )
    return ZeroParts(zero, Model(parameters), rank_of(rank, count), sharded=True)  # type: ignore[arg-type]


def stage_2(rank: int, count: int, frozen: str = "") -> ZeroParts:
    """The parameters one after another, padded, and cut into equal parts."""
    trained = [name for name in SHAPES if name != frozen]
    elements = torch.cat([whole(name) for name in trained])
    part = -(-elements.numel() // count)
    padded = torch.cat([elements, torch.full((part * count - elements.numel(),), PADDING)])
    flat = padded[rank * part : (rank + 1) * part].clone().requires_grad_()
    parameters: dict[str, Any] = {name: whole(name).view(SHAPES[name]) for name in SHAPES}
    begin = 0
    for name in trained:
        size = parameters[name].numel()
        first, last = max(begin, rank * part), min(begin + size, (rank + 1) * part)
        parameters[name]._hp_mapping = first < last and SimpleNamespace(
            lp_fragment_address=SimpleNamespace(start=first - begin, numel=last - first),
            hp_fragment_address=SimpleNamespace(start=first - rank * part, numel=last - first),
        )
        begin += size
    zero = SimpleNamespace(
        bit16_groups=[[parameters[name] for name in trained]], single_partition_of_fp32_groups=[flat]
    )
    return ZeroParts(zero, Model(parameters), rank_of(rank, count), sharded=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("stage", [stage_2, stage_3])
@pytest.mark.parametrize("frozen", ["", "a"])
def test_the_ranks_hold_every_element_once(stage: Any, count: int, frozen: str) -> None:
    held: dict[str, list[tuple[int, list[float]]]] = {name: [] for name in SHAPES}
    for rank in range(count):
        for name, piece in stage(rank, count, frozen).written().items():
            assert piece.shape == SHAPES[name]
            assert count > 1 or piece.is_whole
            if piece.tensor.numel():
                held[name].append((piece.start, piece.tensor.flatten().tolist()))
    for name in SHAPES:
        tiles = sorted(held[name])
        assert [start for start, _ in tiles] == [sum(len(t) for _, t in tiles[:i]) for i in range(len(tiles))]
        assert [value for _, tile in tiles for value in tile] == whole(name).tolist()


@pytest.mark.parametrize("stage", [stage_2, stage_3])
def test_a_frozen_parameter_is_filled_where_it_lies(stage: Any) -> None:
    parts = stage(1, 2, "a")
    assert parts.pieces["a"].tensor.numel() == (15 if stage is stage_2 else 7)


def optimizer_over(flat: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([flat])


@pytest.mark.parametrize("stage", [stage_2, stage_3])
@pytest.mark.parametrize("rank", [0, 2])
def test_states_travel_between_flat_tensors_and_intervals(stage: Any, rank: int) -> None:
    parts = stage(rank, 3)
    (flat,) = {id(i.flat): i.flat for i in parts._intervals.values()}.values()
    before, after = optimizer_over(flat), optimizer_over(flat)
    flat.grad = torch.arange(flat.numel(), dtype=torch.float32)
    before.step()
    expected = {key: value.clone() for key, value in before.state[flat].items()}
    view, states, read = parts.view_state(before), parts.new_state(), parts.view_state(None)
    for piece in parts.pieces.values():
        state = view.state[piece.tensor]
        assert state["exp_avg"].shape == piece.tensor.shape and state["step"] == 1
        read.state[piece.tensor] = {
            key: states.room(piece, key, value.dtype).copy_(value) if key != "step" else value
            for key, value in state.items()
        }
    parts.take_state(after, read, states, "there")
    held = torch.zeros(flat.numel(), dtype=torch.bool)
    for interval in parts._intervals.values():
        held[interval.offset : interval.offset + interval.piece.tensor.numel()] = True
    assert after.state[flat].keys() == expected.keys() and after.state[flat]["step"] == 1
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after.state[flat][key], expected[key] * held)  # padding begins anew at 0


def test_parameters_updated_at_different_times_are_refused() -> None:
    parts = stage_3(0, 2)
    states, read = parts.new_state(), parts.view_state(None)
    for step, piece in enumerate(parts.pieces.values()):
        read.state[piece.tensor] = {"step": torch.tensor(float(step > 0))}
    optimizer = optimizer_over(next(iter(parts._intervals.values())).flat)
    with pytest.raises(DataError, match="the optimiser state in there does not fit DeepSpeed"):
        parts.take_state(optimizer, read, states, "there")
