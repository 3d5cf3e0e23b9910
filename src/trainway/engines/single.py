"""One process, one device: the reference that every other engine must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.checkpoint.adapter import saved_pieces
from trainway.checkpoint.optimizer_state import optimizer_slots, read_optimizer
from trainway.checkpoint.pieces import WHOLE, Piece
from trainway.checkpoint.snapshot import MODEL_DIR, Snapshot
from trainway.checkpoint.weights import load_model, model_pieces
from trainway.config.schema import OptimConfig
from trainway.engines.precision import LossScale, Precision, autocast
from trainway.engines.world import World
from trainway.muon import Spread
from trainway.optim import build_optimizers, clip_gradients, set_learning_rates


@torch.no_grad()
def exchange_pieces(pieces: Mapping[str, Piece], other: Mapping[str, Tensor]) -> None:
    """Swap the values of pieces with those of tensors of the same names; one at a time is held twice."""
    for name, tensor in other.items():
        kept = pieces[name].tensor.clone()
        pieces[name].tensor.copy_(tensor)
        tensor.copy_(kept)


class SingleLearner:
    """Weights, gradients and optimiser state live whole on one device."""

    is_sharded = False

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        optim: OptimConfig,
        world: World,
        precision: Precision,
    ):
        self.module, self.model, self.world, self.precision = module, model, world, precision
        self.pieces = self._pieces()
        self.spread = self._spread()
        self.loss_scale = LossScale.start(precision)
        self.optimizers = build_optimizers(
            [(name, piece.tensor) for name, piece in self.pieces.items()], optim, self.spread, self._num_rows
        )
        self._parameters = [piece.tensor for piece in self.pieces.values() if piece.tensor.requires_grad]

    def micro_step(self, *, sync: bool) -> AbstractContextManager[Any]:
        context = ExitStack()
        context.enter_context(self._exchange(sync))
        context.enter_context(autocast(self.precision, self.world.device))
        return context

    def backward(self, loss: Tensor, *, scale: float) -> None:
        (loss * (scale * self.loss_scale.value)).backward()

    def step(self, lr_factor: float, max_norm: float, accept: Callable[[float], bool]) -> float:
        if self.loss_scale.enabled:
            torch._foreach_mul_(
                [p.grad for p in self._parameters if p.grad is not None], 1 / self.loss_scale.value
            )
        norm = clip_gradients(self._parameters, max_norm, self.spread).item()  # device→host sync
        explained = self.loss_scale.update(overflowed=not math.isfinite(norm))
        if not explained and accept(norm):
            set_learning_rates(self.optimizers, lr_factor)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self) -> AbstractContextManager[Any]:
        return autocast(self.precision, self.world.device)

    def snapshot(self) -> Snapshot:
        part = WHOLE if self.world.is_main else None  # every rank holds the same weights
        return Snapshot(
            saved_pieces(self.model, self.pieces), optimizer_slots(self.optimizers, self.pieces), part
        )

    def read(self, directory: Path, *, weights_only: bool = False) -> None:
        load_model(self.model, directory / MODEL_DIR, self.pieces)
        if not weights_only:
            read_optimizer(self.optimizers, self.pieces, directory)

    def reset(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def exchange(self, other: Mapping[str, Tensor]) -> None:
        exchange_pieces(self.pieces, other)

    def state(self) -> dict[str, Any]:
        return self.loss_scale.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss_scale.load(state)

    def _exchange(self, sync: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def _pieces(self) -> dict[str, Piece]:
        """The parameters, or what of them is here, as the optimisers hold them."""
        return model_pieces(self.model)

    def _spread(self) -> Spread:
        """Where the rows of the parameters lie."""
        return Spread()

    def _num_rows(self, parameter: Tensor) -> int:
        return len(parameter)
