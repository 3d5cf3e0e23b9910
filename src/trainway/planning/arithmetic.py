"""The arithmetic of a model: its parameters, its FLOPs, and a device's peak (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from trainway.config.schema import LoraConfig, ModelConfig
from trainway.planning.adapters import count_adapters
from trainway.planning.gpus import gpu_of_device
from trainway.planning.shapes import ModelShape, new_shape

FP32 = 4
"""Bytes of one fp32 number."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; `matmul` counts each weight that a token is multiplied with, the head included, tied or not.

    Of a mixture of experts `matmul` and `active` count the experts of one token; `trainable` those of adapters, if any.
    """

    total: int
    embedding: int
    matmul: int
    trainable: int
    active: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the highest point of a step; what is not there at that moment counts 0.

    `host` is what lies in the CPU's memory instead and no part of the total.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """All that the loss holds, and gradients of head and embedding on their way."""
    gathered: int = 0
    """Of others' shards."""
    communication: int = 0
    """Buffers in which gradients travel."""
    answers: int = 0
    """Caches of the answers that a student writes, and what of its weights is gathered for them."""
    staging: int = 0
    """The copy of the state that an asynchronous save writes."""
    host: int = 0

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        computing = self.activations + self.logits + self.gathered + self.communication
        return states + computing + self.answers + self.staging


def padded_vocab_size(size: int) -> int:
    """The next multiple of 64: whole tiles for the matrix units."""
    return -(-size // 64) * 64


def head_geometry(model: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key and value heads, width of a head) with the documented defaults filled in."""
    return (
        model.num_heads,
        model.num_kv_heads or model.num_heads,
        model.head_dim or model.hidden_size // model.num_heads,
    )


def count_parameters(
    model: ModelConfig | ModelShape, vocab_size: int | None = None, lora: LoraConfig | None = None
) -> ParameterCount:
    """Exact counts of the model that transformers builds; adapters of an enabled `lora` are counted as trainable.

    `vocab_size`: rows of the embedding, for a ModelConfig.
    """
    shape = as_shape(model, vocab_size)
    total = shape.size
    embedding = shape.vocab_size * shape.hidden_size
    idle = {"experts": 0, "expert_biases": 0}
    for layer in shape.layers:
        for weight in layer.weights:
            if weight.kind in idle:
                idle[weight.kind] += round((1 - layer.active) * weight.size)
    in_blocks = sum(
        w.size for layer in shape.layers for w in layer.weights if w.kind in ("linear", "experts")
    )
    tuned = lora is not None and lora.enabled
    return ParameterCount(
        total=total,
        embedding=embedding,
        matmul=in_blocks - idle["experts"] + embedding,
        trainable=count_adapters(shape, lora).trainable if tuned and lora else total,
        active=total - sum(idle.values()),
    )


def flops_per_token(
    model: ModelConfig | ModelShape,
    vocab_size: int | None = None,
    context: int = 0,
    *,
    causal: bool = False,
    lora: LoraConfig | None = None,
) -> float:
    """FLOPs of forward and backward for one token: 6 N_matmul + 12 L d_attn T_eff (PaLM, appendix B).

    `context` is the tokens of a row or a document. The published convention takes T_eff = context; `causal` takes
    the (context + 1) / 2 keys that a query really meets. Sliding attention meets no more than its window. The head
    counts as a matmul, the input embedding does not. Frozen weights have no gradient of their own: 4 N instead of 6.
    """
    shape = as_shape(model, vocab_size)
    attention = 0.0
    for layer in shape.layers:
        reach = min(context, layer.window or context)
        attention += 12.0 * shape.num_heads * shape.head_dim * ((reach + 1) / 2 if causal else reach)
    matmul = count_parameters(shape).matmul
    if lora is not None and lora.enabled:
        return 4.0 * matmul + 6.0 * count_adapters(shape, lora).matmul + attention
    return 6.0 * matmul + attention


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None when it is not in the catalogue of `planning.gpus`."""
    gpu = gpu_of_device(device_name)
    return gpu.bf16_flops or None if gpu else None


def as_shape(model: ModelConfig | ModelShape, vocab_size: int | None = None) -> ModelShape:
    """The shape of a model of either kind; a ModelConfig needs the rows of its embedding."""
    if isinstance(model, ModelShape):
        return model
    assert vocab_size is not None
    return new_shape(model, vocab_size)
