"""Building a model: its transformers configuration, its seeded initial weights, its packed attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.weights import model_pieces
from trainway.config.schema import ModelConfig
from trainway.errors import ConfigError
from trainway.models.attention import use_packed_attention
from trainway.models.fused import fuse_blocks
from trainway.planning.arithmetic import head_geometry

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def transformer_config(
    model: ModelConfig, vocab_size: int, bos_id: int | None, eos_id: int | None, pad_id: int | None
) -> PreTrainedConfig:
    """The configuration that transformers loads the exported model with. Raises ConfigError for impossible shapes."""
    _check_shapes(model)
    num_heads, num_kv_heads, head_dim = head_geometry(model)
    return _CLASSES[model.architecture][0](
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=model.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def build_model(
    model: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> PreTrainedModel:
    """A new fp32 model with the weights that `NewWeights` makes.

    On "meta" nothing is allocated: for counting, or to be sharded first. Raises ConfigError for impossible shapes.
    """
    config = transformer_config(model, vocab_size, bos_id, eos_id, pad_id)
    with init_empty_weights():  # buffers are real: no checkpoint restores them
        built = _CLASSES[model.architecture][1](config).float()
    built.tie_weights()  # the context above has cut the ties
    use_packed_attention(built)
    fuse_blocks(built)
    if torch.device(device).type != "meta":
        allocate(built, built, device=device)
        NewWeights(model, seed)(model_pieces(built).items())
    return built


class InitialWeights(Protocol):
    """The weights that a model begins with: the same under every engine, whatever each rank holds of them."""

    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        """Fill every parameter of the model, by name and in the order of `named_parameters`, or its piece.

        The pieces are taken one at a time: an iterator may make room for one and put it away before the next.
        """


@dataclass(frozen=True)
class NewWeights:
    """Random weights, a function of `seed` and `model` alone.

    Matrices are normal(0, init_std); those that write to the residual stream are scaled by 1 / sqrt(2 num_layers)
    (Radford et al. 2019, GPT-2, section 2.3); norms are 1. Whoever fills pieces holds at most one whole matrix.
    """

    model: ModelConfig
    seed: int

    @torch.no_grad()
    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same weights on every device
        residual_std = self.model.init_std / (2 * self.model.num_layers) ** 0.5
        for name, piece in pieces:
            if len(piece.shape) < 2:
                piece.tensor.fill_(1.0)
                continue
            std = (
                residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.model.init_std
            )
            values = torch.empty(piece.shape).normal_(0.0, std, generator=generator)
            piece.copy_from(values)


def allocate(
    root: nn.Module,
    built: PreTrainedModel,
    *,
    device: torch.device | str,
    weights_device: torch.device | str | None = None,
) -> None:
    """Give the parameters of a model that are on the meta device, somewhere in `root`, room.

    Others keep their values, and so do buffers. `weights_device`: where weights lie, if not on `device`.
    """
    # 1) what has values aside 2) to_empty, which would clear them too 3) back again 4) ties, which to_empty cuts
    buffers = [(owner, name, buffer) for owner in root.modules() for name, buffer in owner._buffers.items()]
    real = [
        (owner, name, parameter)
        for owner in root.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and not parameter.is_meta
    ]
    for owner, name, _ in real:
        owner._parameters[name] = None
    root.to_empty(device=weights_device or device)
    for owner, name, parameter in real:
        owner._parameters[name] = parameter
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer if buffer is None else buffer.to(device)
    built.tie_weights()


def _check_shapes(model: ModelConfig) -> None:
    num_heads, num_kv_heads, head_dim = head_geometry(model)
    if model.hidden_size % num_heads:
        raise ConfigError(
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {num_heads}",
            "each head takes an equal share of the residual stream",
            f"use a hidden_size of {max(1, round(model.hidden_size / num_heads)) * num_heads}, or other num_heads",
        )
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"model.num_heads {num_heads} is not divisible by model.num_kv_heads {num_kv_heads}",
            "each key and value head serves an equal number of query heads",
            "use a num_kv_heads that divides num_heads, or leave it empty",
        )
    if head_dim % 2:
        raise ConfigError(
            f"the width of a head, {head_dim}, is odd",
            "rotary position embedding turns pairs of numbers",
            "set an even model.head_dim, or a hidden_size that is an even multiple of num_heads",
        )
