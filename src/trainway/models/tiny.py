"""Whether a model keeps packed documents apart: tried on a copy of a few thousand weights, never assumed."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from trainway.models.attention import PACKED_ATTENTION, use_packed_attention
from trainway.models.causal_lm import CausalLMLoss

BOUNDARIES = (0, 7, 20, 24, 33, 48)
"""The documents of the trial: two rows of 24 tokens."""

_VOCAB = 64
_SMALL: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    # shorter than a document of the trial, or they would never show
    "sliding_window": 5,
    "attention_chunk_size": 5,
}
"""Sizes of the copy, by transformers' names; only what a configuration has is set."""


def packing_fault(model: PreTrainedModel, attention: str, device: torch.device | str = "cpu") -> str | None:
    """Why documents in one row would change each other's results under `attention`, transformers' name or ours; or None.

    A copy of the model's class with few and random weights runs over packed documents through `CausalLMLoss`, and over
    each alone as plain transformers does it by definition ("eager"); summed losses and all gradients must agree.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            alone = tiny_copy(model)
            packed = deepcopy(alone)
            ids = torch.randint(2, _VOCAB, (2, 24))
        alone.set_attn_implementation("eager")
        if attention == PACKED_ATTENTION:
            use_packed_attention(packed)
        else:
            packed.set_attn_implementation(attention)
        kind = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
        module = CausalLMLoss(packed.to(device, kind).eval())
        expected = _each_alone(alone.to(device, kind).eval(), ids.to(device))
        found = _packed(module, ids.to(device))
    except Exception as error:  # whatever such a copy fails with, nothing is known then
        return (
            f"a small copy of it cannot be tried: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        )
    return _difference(found, expected, 1e-4 if kind == torch.float32 else 5e-2)


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and switches, fp32 on the CPU, with two layers or one of each kind; random weights."""
    copy = type(model)(_tiny_config(model.config)).float()
    with torch.no_grad():
        for parameter in copy.parameters():
            # large enough for scores, softcaps and sinks to matter; norms and biases only shaken
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.2 * noise)
    return copy


def _tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    values = config.to_dict()
    names = {config.attribute_map.get(name, name): size for name, size in _SMALL.items()}
    small = {name: size for name, size in names.items() if values.get(name) is not None}
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    layers = _layers_to_keep(config)
    depth = config.num_hidden_layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            small[name] = [value[index] for index in layers]
        elif name.startswith("rope_") and isinstance(value, dict):
            small[name] = _plain_rope(value)
        elif ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            small[name] = 0.0
    small[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    small |= {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32"}
    for name in ("quantization_config", "auto_map", "_name_or_path", "architectures", "torch_dtype"):
        values.pop(name, None)
    return type(config).from_dict(values | small)


def _layers_to_keep(config: PreTrainedConfig) -> list[int]:
    """Two layers, or the first of each kind where there are several."""
    kinds = getattr(config, "layer_types", None)
    firsts = sorted({kind: kinds.index(kind) for kind in kinds}.values()) if kinds else []
    return firsts if len(firsts) > 1 else list(range(min(2, config.num_hidden_layers)))


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same base and share of the width, without the tables that some scalings hold for each pair of numbers."""
    kept = {"rope_theta", "partial_rotary_factor"}
    plain: dict[str, Any] = {
        name: _plain_rope(value) if isinstance(value, dict) else value
        for name, value in rope.items()
        if isinstance(value, dict) or name in kept
    }
    return plain | ({"rope_type": "default"} if "rope_type" in rope else {})


def _packed(module: CausalLMLoss, ids: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDARIES)])
    loss = module(ids, ids, positions.view(ids.shape).to(ids.device), BOUNDARIES)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.model.parameters()]


def _each_alone(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The trial's labels are its own tokens: any will do, as long as both sides have the same."""
    total = torch.zeros((), device=ids.device)
    for start, stop in pairwise(BOUNDARIES):
        document = ids.flatten()[None, start:stop]
        logits = model(input_ids=document, use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), document[0], reduction="sum")
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in model.parameters()]


def _difference(
    found: tuple[Tensor, list[Tensor | None]], expected: tuple[Tensor, list[Tensor | None]], tolerance: float
) -> str | None:
    apart = "in a small copy of it, documents that share a row change each other's"
    if not bool((found[0] - expected[0]).abs() <= tolerance * expected[0].abs()):
        return f"{apart} losses ({float(found[0]):.4f} in place of {float(expected[0]):.4f})"
    ours, theirs = (
        torch.cat([grad.flatten().float() for grad in grads if grad is not None])
        for grads in (found[1], expected[1])
    )
    # twenty times as lax: gradients sum over many more roundings, and what is mixed up changes them wholly
    if ours.shape != theirs.shape or not bool((ours - theirs).norm() <= 20 * tolerance * theirs.norm()):
        return f"{apart} gradients"
    return None
