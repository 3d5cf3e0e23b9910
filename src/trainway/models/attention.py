"""Packed attention as transformers knows it: tokens attend within their own segment of a row, without a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainway.errors import ConfigError
from trainway.models.segments import Segments, attend_plainly, attend_segments

PACKED_ATTENTION = "trainway_packed"
"""Name under which transformers knows this attention."""

_WITHOUT_EFFECT = {
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "layer_idx",
    "return_dict",
    "output_router_logits",
}
"""What models hand on to their attention that changes nothing in it."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes `model.model(input_ids, position_ids=..., boundaries=...)` attend within segments only.

    `boundaries` is a tuple of ints over the flattened [B * T] tokens, the first 0 and the last B * T; no segment
    crosses a row. Without it, in generation for one, the model does what transformers' "sdpa" does, or by definition
    where "sdpa" knows not how (sinks, softcap).
    """
    model.set_attn_implementation(PACKED_ATTENTION)
    body = model.get_submodule(model.base_model_prefix)
    body.register_forward_pre_hook(_prepare_segments, with_kwargs=True)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    boundaries: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv] to
    [B, T, Hq, Dv].

    Raises ConfigError for anything that would change the result and is not known here.
    """
    if boundaries is not None:
        _refuse_unknown(module, dropout, is_causal, kwargs)
        out = attend_segments(query, key, value, boundaries, scaling, sliding_window, softcap, s_aux)
        return out, None
    if attention_mask is not None and attention_mask.numel() == 0 and query.numel():
        raise ConfigError(
            f"{type(module).__name__} does not hand the documents' boundaries on to its attention",
            "packed attention cannot keep documents apart",
            "set model.attention=sdpa or eager",
        )
    if softcap is None and s_aux is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_unknown(module, dropout, is_causal, kwargs, "past_key_values")
    if attention_mask is None and query.shape[2] > 1:
        # the mask was left out because it would be causal and nothing else
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril_()
    out = attend_plainly(query, key, value, attention_mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(
    module: nn.Module, dropout: float, is_causal: bool | None, others: dict[str, Any], *allowed: str
) -> None:
    name = type(module).__name__
    if dropout:
        raise ConfigError(
            f"{name} has an attention dropout of {dropout}",
            "packed attention has none",
            "set model.attention=sdpa, or the dropout in the model's config.json to 0",
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ConfigError(
            f"{name} is not causal", "packed attention looks back only", "set model.attention=sdpa"
        )
    for key, value in others.items():
        if value is None or value is False or key in _WITHOUT_EFFECT or key in allowed:
            continue
        raise ConfigError(
            f"{name} asks of its attention what packed attention does not know: {key}",
            "to ignore it would change the model's results",
            "set model.attention=sdpa or eager",
        )


def _prepare_segments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    boundaries = kwargs.get("boundaries")
    if boundaries is None:
        kwargs.pop("boundaries", None)
        return args, kwargs
    input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    assert boundaries[0] == 0 and boundaries[-1] == input_ids.numel(), (
        "boundaries must span the flattened batch"
    )
    # transformers takes a mask of four dimensions as final: it neither builds one nor looks for resets of position_ids
    final = torch.empty(0, 0, 0, 0, device=input_ids.device)
    return args, kwargs | {"boundaries": Segments(tuple(boundaries)), "attention_mask": final}


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
