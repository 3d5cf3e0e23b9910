"""Building a model: its transformers configuration, its seeded initial weights, its packed attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
    """A new fp32 model with the weights that `materialize` makes.

    On "meta" nothing is allocated: for counting, or to be sharded first. Raises ConfigError for impossible shapes.
    """
    config = transformer_config(model, vocab_size, bos_id, eos_id, pad_id)
    with torch.device("meta"):  # spares the weights that transformers would draw from the global generator
        built = _CLASSES[model.architecture][1](config).float()
    use_packed_attention(built)
    fuse_blocks(built)
    if torch.device(device).type != "meta":
        materialize(built, built, model, seed=seed, device=device)
    return built


@torch.no_grad()
def materialize(
    root: nn.Module,
    built: PreTrainedModel,
    model: ModelConfig,
    *,
    seed: int,
    device: torch.device | str,
    weights_device: torch.device | str | None = None,
) -> None:
    """Give a model on the meta device, somewhere in `root`, its weights: a function of `seed` and `model` alone.

    Matrices are normal(0, init_std); those that write to the residual stream are scaled by 1 / sqrt(2 num_layers)
    (Radford et al. 2019, GPT-2, section 2.3); norms are 1. Of a sharded model each rank keeps its own rows, and none
    holds more than one whole matrix at a time. `weights_device`: where weights lie, if not on `device`.
    """
    # 1) to_empty 2) the rotary table, a buffer that no checkpoint restores 3) ties, which to_empty cuts 4) weights
    root.to_empty(device=weights_device or device)
    body = built.get_submodule(built.base_model_prefix)
    body.rotary_emb = type(body.rotary_emb)(config=built.config).to(device)
    built.tie_weights()
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same weights on every device
    residual_std = model.init_std / (2 * model.num_layers) ** 0.5
    for name, parameter in built.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
            continue
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else model.init_std
        _fill(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def _fill(parameter: Tensor, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # every rank has drawn the same values: each takes its rows, and nothing is sent
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(mesh.device_type), mesh, placements, src_data_rank=None)
    parameter.copy_(values)


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
