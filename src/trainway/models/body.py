"""The body of a transformers model: its last hidden states, with the segments of packed rows kept apart."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trainway.models.attention import PACKED_ATTENTION
from trainway.models.segments import Segments


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None,
    boundaries: tuple[int, ...] | None,
) -> Tensor:
    """The normalised last hidden states of the body of `model`, whatever its head: [B, T, H] of input_ids [B, T].

    boundaries: see `attention.use_packed_attention`; None for whole rows, which may be padded on their right.
    """
    body = model.get_submodule(model.base_model_prefix)
    inputs = {"position_ids": position_ids, "use_cache": False}
    known = signature(body.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    inputs |= _segments(model, input_ids, position_ids, boundaries)
    hidden: Tensor = body(input_ids=input_ids, **inputs).last_hidden_state
    return hidden


def _segments(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None,
    boundaries: tuple[int, ...] | None,
) -> dict[str, Any]:
    """What tells the attention in use where documents end, beside position_ids that start anew with each."""
    attention = model.config._attn_implementation
    if attention == PACKED_ATTENTION:
        if boundaries is None:
            rows, length = input_ids.shape
            boundaries = tuple(range(0, rows * length + 1, length))
        return {"boundaries": boundaries}
    if boundaries is None:
        return {}
    assert position_ids is not None, "transformers knows documents by positions that start anew"
    if attention != "flash_attention_2":
        return {}
    segments = Segments(boundaries)
    return {
        "cu_seq_lens_q": segments.cu_seqlens,
        "cu_seq_lens_k": segments.cu_seqlens,
        "max_length_q": segments.longest,
        "max_length_k": segments.longest,
    }
