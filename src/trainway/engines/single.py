"""One process, one device: the reference that every other engine must equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainway.checkpoint.weights import load_model, read_optimizer, write_model, write_optimizer
from trainway.config.schema import OptimConfig
from trainway.engines.precision import LossScale, Precision, autocast
from trainway.engines.world import World
from trainway.optim import build_optimizers, clip_gradients, set_learning_rates

MODEL_DIR = "model"
OPTIMIZER_FILE = "optimizer.safetensors"


class SingleLearner:
    """Weights, gradients and optimiser state live whole on one device."""

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        optim: OptimConfig,
        world: World,
        precision: Precision,
    ):
        self.module, self.model, self.world, self.precision = module, model, world, precision
        self.optimizers = build_optimizers(list(model.named_parameters()), optim)
        self.loss_scale = LossScale.start(precision)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

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
        norm = clip_gradients(self._parameters, max_norm).item()  # device→host sync
        explained = self.loss_scale.update(overflowed=not math.isfinite(norm))
        if not explained and accept(norm):
            set_learning_rates(self.optimizers, lr_factor)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def write(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.world.is_main:  # every rank holds the same weights
            write_model(self.model, directory / MODEL_DIR, tokenizer)
            write_optimizer(self.optimizers, list(self.model.named_parameters()), directory / OPTIMIZER_FILE)

    def read(self, directory: Path) -> None:
        load_model(self.model, directory / MODEL_DIR)
        read_optimizer(self.optimizers, list(self.model.named_parameters()), directory / OPTIMIZER_FILE)

    def state(self) -> dict[str, Any]:
        return self.loss_scale.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss_scale.load(state)

    def _exchange(self, sync: bool) -> AbstractContextManager[Any]:
        return nullcontext()
