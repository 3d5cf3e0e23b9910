"""The contract of every engine: on any number of ranks, the gradient is that of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.snapshot import Snapshot


class Learner(Protocol):
    """A model with its optimisers, spread over the ranks as its engine does it.

    One optimiser step is, on every rank:

        for i, batch in enumerate(micro_batches):
            with learner.micro_step(sync=i == last):
                loss = learner.module(...)                   # a sum over this rank's target tokens
                learner.backward(loss, scale=1 / global_target_tokens)
        norm = learner.step(lr_factor, max_norm, accept)

    Losses are sums, divided once by the global number of target tokens; so the gradient does not depend on how
    the rows are spread over micro-batches and ranks.
    """

    module: nn.Module
    """The callable that the engine wraps; its forward returns a summed loss."""
    model: PreTrainedModel
    """The transformers model inside; its weights are whole only where `is_sharded` is False."""
    pieces: dict[str, Piece]
    """What this rank holds of each parameter, as the optimisers know it."""
    is_sharded: bool
    """Every rank must take part in every forward pass, evaluation and generation included."""

    def micro_step(self, *, sync: bool) -> AbstractContextManager[Any]:
        """Forward and backward of one micro-batch; gradients are exchanged when `sync` (the step's last one)."""

    def backward(self, loss: Tensor, *, scale: float) -> None:
        """Add the gradient of `loss * scale`, summed over all ranks, to the parameters' gradients."""

    def step(self, lr_factor: float, max_norm: float, accept: Callable[[float], bool]) -> float:
        """Clip, and update the weights if `accept(norm)`; drop the gradients either way.

        Args:
            lr_factor: multiplies each group's peak learning rate.
            max_norm: global gradient norm to clip to; 0 turns clipping off.
            accept: decides by the global gradient norm, the same on all ranks, whether the step is taken.

        Returns:
            The global gradient norm before clipping.
        """

    def whole(self) -> AbstractContextManager[Any]:
        """Within it this rank may call `model` by itself, without gradients: its weights are whole, in the arithmetic
        of training. All ranks enter it together, and each leaves when it likes."""

    def snapshot(self) -> Snapshot:
        """This rank's part of weights and optimiser state, by reference: valid until the next `step`."""

    def read(self, directory: Path, *, weights_only: bool = False) -> None:
        """Load what was saved from any engine, whatever the number of ranks then and now.

        `weights_only`: the optimiser state stays as it is.
        """

    def reset(self) -> None:
        """Forget the optimiser state, as if no step had been taken."""

    def exchange(self, other: Mapping[str, Tensor]) -> None:
        """Swap the trained weights with `other`: by name, tensors like those of `pieces`. All ranks call it together."""

    def state(self) -> dict[str, Any]:
        """Small extra state that JSON can hold (fp16's loss scale)."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
