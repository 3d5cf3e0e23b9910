"""The arithmetic of a model: its parameters, its FLOPs, its bytes of memory, and a device's peak (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainway.config.schema import LoraConfig, ModelConfig
from trainway.planning.adapters import count_adapters
from trainway.planning.gpus import gpu_of_device
from trainway.planning.shapes import ModelShape, Weight, new_shape

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
    """Bytes on one rank; `logits` is all that the loss holds, `gathered` what a rank holds of others' shards, and
    `host` what lies in the CPU's memory instead, which is no part of the total."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.gathered


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
    total = sum(weight.size for weight in shape.weights())
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


def memory_bytes(
    model: ModelConfig | ModelShape,
    vocab_size: int | None = None,
    *,
    micro_batch_size: int,
    seq_len: int,
    loss_chunk_tokens: int,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpointing: Literal["none", "selective", "full"] = "none",
    half_precision: bool = False,
    shards: int | None = None,
    engine: Literal["fsdp", "zero2", "zero3"] = "fsdp",
    cpu_offload: Literal["none", "optimizer", "all"] = "none",
    lora: LoraConfig | None = None,
    eager_attention: bool = False,
) -> MemoryEstimate:
    """Estimated bytes of one rank: fp32 weights, and `half_precision` for autocast to bf16 or fp16.

    `shards`: ranks over which `engine` cuts the states; None for single and ddp. An enabled `lora` freezes the model,
    which then is held in the type of the arithmetic. DeepSpeed (zero2, zero3) holds weights in that type too, and an
    fp32 copy beside the moments. `eager_attention` keeps the scores of all pairs of tokens of a row.
    Activations are what autograd keeps of transformers' own blocks (Korthikanti et al. 2022 counts the same way);
    the allocator's slack and the CUDA context, about 1 GiB, come on top.
    """
    shape = as_shape(model, vocab_size)
    tuned = lora if lora is not None and lora.enabled else None
    states = _States.of(shape, optimizer, tuned, half_precision, engine if shards else None)
    tokens = micro_batch_size * seq_len
    chunk = min(tokens, loss_chunk_tokens)
    scores = seq_len if eager_attention else 0
    return states.spread(
        shards or 1,
        engine if shards else None,
        cpu_offload,
        activations=tokens * _activation_bytes_per_token(shape, checkpointing, half_precision, scores),
        logits=_loss_bytes(shape, tokens, chunk, half_precision, frozen_head=tuned is not None),
    )


def as_shape(model: ModelConfig | ModelShape, vocab_size: int | None = None) -> ModelShape:
    """The shape of a model of either kind; a ModelConfig needs the rows of its embedding."""
    if isinstance(model, ModelShape):
        return model
    assert vocab_size is not None
    return new_shape(model, vocab_size)


@dataclass(frozen=True)
class _States:
    """Bytes of what a model's states take before they are spread, and of what is gathered at once."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int

    @classmethod
    def of(
        cls, shape: ModelShape, optimizer: str, lora: LoraConfig | None, half: bool, engine: str | None
    ) -> _States:
        total = sum(weight.size for weight in shape.weights())
        work = 2 if half else FP32
        matrices = [layer.matrices for layer in shape.layers]
        block, outside = max(matrices), total - sum(matrices)
        if lora is not None:
            adapted = count_adapters(shape, lora)
            trainable, frozen = adapted.trainable, (total - adapted.quantized) * work
            frozen += -(-adapted.quantized * 33 // 64)  # 4 bits, and a byte of scale for 64 of them
            weights = frozen + trainable * (work if engine in ("zero2", "zero3") else FP32)
            gathered = work * outside + 2 * block * work
        else:
            trainable = total
            weights = total * (work if engine in ("zero2", "zero3") else FP32)
            gathered = (
                2 * FP32 * outside + 2 * block * (work + FP32)
                if engine == "fsdp"
                else (work + FP32) * outside + 2 * block * (work + FP32)
            )
        moments = 2 * trainable * FP32
        if optimizer == "muon":
            moments -= sum(matrices) * FP32 if lora is None else 0  # one momentum, no second moment
        if engine in ("zero2", "zero3"):
            moments += trainable * FP32
        if engine == "zero2":  # gradients of two blocks before they are reduced
            gathered = 2 * block * FP32 if lora is None else 0
        return cls(weights, trainable * FP32, moments, gathered if engine else 0)

    def spread(
        self, shards: int, engine: str | None, offload: str, activations: int, logits: int
    ) -> MemoryEstimate:
        weights = self.weights if engine == "zero2" else self.weights // shards
        gradients, optimizer = self.gradients // shards, self.optimizer // shards
        host = 0
        if engine and offload != "none":
            host = gradients + optimizer
            gradients = optimizer = 0
        if engine in ("fsdp", "zero3") and offload == "all":
            host += weights
            weights = 0
        return MemoryEstimate(weights, gradients, optimizer, activations, logits, self.gathered, host)


def _activation_bytes_per_token(
    shape: ModelShape, checkpointing: str, half_precision: bool, scores: int
) -> int:
    """Bytes of one token. scores: keys of whose attention scores eager attention keeps the softmax, in both types."""
    heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
    size = 2 if half_precision else FP32
    # The residual stream and the norms stay fp32: input and normalised input; the matmuls keep a copy in their type.
    norm = shape.hidden_size * (2 * FP32 + size)
    attention = size * width * (2 * heads + 2 * kv_heads) + FP32 * heads  # q, out, k, v and the lse
    attention += heads * scores * (FP32 + size)
    blocks, kept = [], []
    for layer in shape.layers:
        names = {weight.name for weight in layer.weights}
        inner = attention
        if "self_attn.q_norm.weight" in names:
            inner += 2 * FP32 * width * (heads + kv_heads)  # q_norm and k_norm
        norms = sum(_is_norm(weight, shape) for weight in layer.weights)
        blocks.append(max(norms, 1) * norm + inner + size * layer.kept)
        # selective: the block's input, and what its matrix products and attention gave
        products = size * (2 * shape.hidden_size + layer.products) + inner
        kept.append(FP32 * shape.hidden_size + products)
    if checkpointing == "full":
        return len(blocks) * FP32 * shape.hidden_size + max(blocks) + norm
    if checkpointing == "selective":
        return sum(kept) + max(blocks) + norm
    return sum(blocks) + norm


def _is_norm(weight: Weight, shape: ModelShape) -> bool:
    owner, _, part = weight.name.rpartition(".")
    return part == "weight" and weight.shape == (shape.hidden_size,) and "self_attn." not in owner


def _loss_bytes(
    shape: ModelShape, tokens: int, chunk: int, half_precision: bool, *, frozen_head: bool
) -> int:
    vocab, hidden = shape.vocab_size, shape.hidden_size
    gradients = tokens * hidden * FP32  # of hidden and head, made in the forward pass
    if not frozen_head:
        gradients += vocab * hidden * FP32
    logits = chunk * vocab * FP32
    if (
        half_precision
    ):  # the logits once more as the GEMM writes and reads them, and the head in half precision
        logits += 2 * chunk * vocab
        if not frozen_head:
            logits += 2 * vocab * hidden
    return gradients + logits
