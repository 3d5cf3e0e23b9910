"""What a model consists of: its parameters by what becomes of them in training, and the FLOPs of a token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class Census:
    """Numbers of weights."""

    total: int
    trainable: int
    active: int
    """Those that one token meets: of a mixture's experts only as many as it is sent to. All embeddings are counted."""
    matmul: int
    """Active weights that a token is multiplied with: the output head, tied or not, but no embedding, bias or norm."""
    matmul_trainable: int


def model_census(model: PreTrainedModel) -> Census:
    """Count the weights of any causal language model, on the meta device too; with adapters in it, those as well."""
    share = _share_of_experts(model.config.get_text_config())
    embeddings = {id(p) for module in _embeddings(model) for p in module.parameters(recurse=False)}
    head = model.get_output_embeddings()
    head_weights = {id(p) for p in head.parameters()} if head is not None else set()
    total = trainable = active = matmul = matmul_trainable = 0.0
    for name, parameter in model.named_parameters():
        is_expert = re.search(r"(^|\.)experts\.", name) is not None
        met = parameter.numel() * (share if is_expert else 1.0)
        total += parameter.numel()
        active += met
        trainable += parameter.numel() * parameter.requires_grad
        # an expert's bias is a row of a matrix
        is_matrix = parameter.ndim - (is_expert and name.endswith("bias")) >= 2
        if is_matrix and (id(parameter) not in embeddings or id(parameter) in head_weights):
            matmul += met
            matmul_trainable += met * parameter.requires_grad
    return Census(round(total), round(trainable), round(active), round(matmul), round(matmul_trainable))


def flops_per_token(census: Census, config: PreTrainedConfig, context: int, *, causal: bool = False) -> float:
    """FLOPs of forward and backward for one token of a row or document of `context` tokens.

    2 of the forward pass and 2 of the gradients of the inputs for each matmul weight, 2 more where the weight learns
    (PaLM, appendix B: 6 N; LoRA: 4 N of the frozen weights); and 6 for each number of a head's query and value for each
    of T_eff keys: min(context, sliding window), or with `causal` the mean over the keys that a query really meets.
    """
    config = config.get_text_config()
    attention = sum(
        6.0 * config.num_attention_heads * _head_widths(config) * _keys(context, window, causal)
        for window in _windows(config)
    )
    return 4.0 * census.matmul + 2.0 * census.matmul_trainable + attention


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding))


def _share_of_experts(config: PreTrainedConfig) -> float:
    experts = next((number for name in _NUM_EXPERTS if (number := getattr(config, name, None))), None)
    top_k = next((number for name in _TOP_K if (number := getattr(config, name, None))), None)
    return top_k / experts if experts and top_k else 1.0


def _head_widths(config: PreTrainedConfig) -> int:
    """Numbers of a head's query and of its value together."""
    if getattr(config, "v_head_dim", None) and getattr(config, "qk_nope_head_dim", None):  # latent attention
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(width)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Of each layer with attention over keys: how many it looks back, None for all."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [window] * config.num_hidden_layers
    return [window if "sliding" in kind else None for kind in kinds if "linear" not in kind]


def _keys(context: int, window: int | None, causal: bool) -> float:
    reach = min(context, window or context)
    if not causal:
        return float(reach)
    # the first `reach` queries meet 1, 2, ... keys, the others `reach`
    return (reach * (reach + 1) / 2 + (context - reach) * reach) / context
