"""A model as a plan sees it: its shape, and what is asked of it again and again, counted once (no torch)."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from trainway.config.schema import LoraConfig
from trainway.planning.arithmetic import ParameterCount, count_parameters, flops_per_token
from trainway.planning.shapes import ModelShape, is_mixture


@dataclass(frozen=True, eq=False)
class Model:
    """A shape and how it is tuned. Two of them are the same only if they are one object: figures are kept by it."""

    shape: ModelShape
    lora: LoraConfig

    @cached_property
    def counts(self) -> ParameterCount:
        return count_parameters(self.shape, lora=self.lora)

    @property
    def total(self) -> int:
        return self.counts.total

    @property
    def trained(self) -> int:
        """Parameters that have a gradient: adapters, or all."""
        return self.counts.trainable

    @property
    def num_layers(self) -> int:
        return len(self.shape.layers)

    @property
    def is_mixture(self) -> bool:
        return is_mixture(self.shape.family)

    @cached_property
    def matrices(self) -> int:
        """Elements of the blocks' matrices."""
        return sum(layer.matrices for layer in self.shape.layers)

    @cached_property
    def windows(self) -> Counter[int | None]:
        """How many blocks look back so far; None: all the way."""
        return Counter(layer.window for layer in self.shape.layers)

    @cached_property
    def read_by(self) -> Counter[float]:
        """Weights by the share of their experts that one token meets; 1 is what every token reads."""
        found: Counter[float] = Counter()
        found[1.0] = sum(weight.size for weight in self.shape.outside if weight.kind != "embedding")
        if self.shape.tie_embeddings:
            found[1.0] += self.counts.embedding  # as the head
        for layer in self.shape.layers:
            for weight in layer.weights:
                found[layer.active if weight.kind in ("experts", "expert_biases") else 1.0] += weight.size
        return found

    def training_flops(self, context: int) -> float:
        """FLOPs of forward and backward for one token; see `flops_per_token`."""
        return _flops(self, context, True)

    def forward_flops(self, context: int) -> float:
        """FLOPs of a forward pass alone for one token."""
        return _flops(self, context, False) / 3


@functools.lru_cache(maxsize=256)
def _flops(model: Model, context: int, tuned: bool) -> float:
    return flops_per_token(model.shape, context=context, lora=model.lora if tuned else None)
