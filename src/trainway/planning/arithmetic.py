"""The arithmetic of a model: its parameters, its FLOPs, its bytes of memory, and the peaks of common GPUs (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainway.config.schema import ModelConfig

PEAK_FLOPS: dict[str, float] = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by a part of the device's name; the more specific name stands first."""

FP32 = 4
"""Bytes of one fp32 number."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; `matmul` counts each weight that a token is multiplied with, the head included, tied or not."""

    total: int
    embedding: int
    matmul: int
    trainable: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank; `logits` is all that the loss holds, `gathered` what fsdp holds of others' shards."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int = 0

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


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Exact counts of the Llama or Qwen3 model that `models.load.build_model` makes; neither has biases."""
    block = _block_matrices(model)
    embedding = vocab_size * model.hidden_size
    norms = model.num_layers * 2 * model.hidden_size + model.hidden_size
    if model.architecture == "qwen3":
        norms += (
            model.num_layers * 2 * head_geometry(model)[2]
        )  # q_norm and k_norm, shared by the heads of a layer
    head = 0 if model.tie_embeddings else embedding
    total = model.num_layers * block + embedding + head + norms
    return ParameterCount(
        total=total, embedding=embedding, matmul=model.num_layers * block + embedding, trainable=total
    )


def flops_per_token(model: ModelConfig, vocab_size: int, context: int, *, causal: bool = False) -> float:
    """FLOPs of forward and backward for one token: 6 N_matmul + 12 L d_attn T_eff (PaLM, appendix B).

    `context` is the tokens of a row or a document. The published convention takes T_eff = context; `causal` takes
    the (context + 1) / 2 keys that a query really meets. The head counts as a matmul, the input embedding does not.
    """
    num_heads, _, head_dim = head_geometry(model)
    effective = (context + 1) / 2 if causal else context
    return (
        6.0 * count_parameters(model, vocab_size).matmul
        + 12.0 * model.num_layers * num_heads * head_dim * effective
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None when it is not in `PEAK_FLOPS`."""
    name = device_name.lower()
    return next((peak for part, peak in PEAK_FLOPS.items() if part.lower() in name), None)


def memory_bytes(
    model: ModelConfig,
    vocab_size: int,
    *,
    micro_batch_size: int,
    seq_len: int,
    loss_chunk_tokens: int,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpointing: Literal["none", "selective", "full"] = "none",
    half_precision: bool = False,
    shards: int | None = None,
) -> MemoryEstimate:
    """Estimated bytes of one rank: fp32 weights, and `half_precision` for autocast to bf16 or fp16.

    `shards`: ranks over which fsdp cuts the states; None for single and ddp.
    Activations are what autograd keeps of transformers' own blocks (Korthikanti et al. 2022 counts the same way);
    the allocator's slack and the CUDA context, about 1 GiB, come on top.
    """
    counts = count_parameters(model, vocab_size)
    weights = counts.total * FP32
    moments = 2 * weights
    if optimizer == "muon":
        moments -= model.num_layers * _block_matrices(model) * FP32  # one momentum, no second moment
    tokens = micro_batch_size * seq_len
    count = shards or 1
    return MemoryEstimate(
        weights=weights // count,
        gradients=weights // count,
        optimizer=moments // count,
        gathered=_gathered_bytes(model, counts, half_precision) if shards else 0,
        activations=tokens * _activation_bytes_per_token(model, checkpointing, half_precision),
        logits=_loss_bytes(model, vocab_size, tokens, min(tokens, loss_chunk_tokens), half_precision),
    )


def _block_matrices(model: ModelConfig) -> int:
    """Weights in the matrices of one decoder block."""
    num_heads, num_kv_heads, head_dim = head_geometry(model)
    attention = 2 * model.hidden_size * head_dim * (num_heads + num_kv_heads)
    return attention + 3 * model.hidden_size * model.intermediate_size


def _gathered_bytes(model: ModelConfig, counts: ParameterCount, half_precision: bool) -> int:
    """Weights and gradients outside the blocks, and of two blocks: the next one is gathered while one computes."""
    block = _block_matrices(model)
    outside = counts.total - model.num_layers * block
    return 2 * FP32 * outside + 2 * block * ((2 if half_precision else FP32) + FP32)


def _activation_bytes_per_token(model: ModelConfig, checkpointing: str, half_precision: bool) -> int:
    num_heads, num_kv_heads, head_dim = head_geometry(model)
    size = 2 if half_precision else FP32
    # The residual stream and the norms stay fp32: input and normalised input; the matmuls keep a copy in their type.
    norm = model.hidden_size * (2 * FP32 + size)
    attention = (
        size * head_dim * (2 * num_heads + 2 * num_kv_heads) + FP32 * num_heads
    )  # q, out, k, v and the lse
    if model.architecture == "qwen3":
        attention += 2 * FP32 * head_dim * (num_heads + num_kv_heads)  # q_norm and k_norm
    block = (
        2 * norm + attention + size * 4 * model.intermediate_size
    )  # gate, silu(gate), up and their product
    if checkpointing == "full":
        return model.num_layers * FP32 * model.hidden_size + block + norm
    if checkpointing == "selective":  # the block's input, and what its matrix products and attention gave
        products = size * (2 * model.hidden_size + 2 * model.intermediate_size) + attention
        return model.num_layers * (FP32 * model.hidden_size + products) + block + norm
    return model.num_layers * block + norm


def _loss_bytes(model: ModelConfig, vocab_size: int, tokens: int, chunk: int, half_precision: bool) -> int:
    gradients = (
        (tokens + vocab_size) * model.hidden_size * FP32
    )  # of hidden and head, made in the forward pass
    logits = chunk * vocab_size * FP32
    if (
        half_precision
    ):  # the logits once more as the GEMM writes and reads them, and the head in half precision
        logits += 2 * chunk * vocab_size + 2 * vocab_size * model.hidden_size
    return gradients + logits
