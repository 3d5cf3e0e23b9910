"""Packed attention: tokens attend within their own segment of a row, and no mask is ever made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "trainway_packed"
"""Name under which transformers knows this attention."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes `model.model(input_ids, position_ids=..., boundaries=...)` attend within segments only.

    `boundaries` is a tuple of ints over the flattened [B * T] tokens, the first 0 and the last B * T; no segment
    crosses a row. Without it, in generation for one, the model does what transformers' "sdpa" does.
    """
    model.set_attn_implementation(PACKED_ATTENTION)
    body = model.get_submodule(model.base_model_prefix)
    body.register_forward_pre_hook(_prepare_segments, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one micro-batch.

    An object and not the bare tuple: torch.compile would guard on each of its ints and compile anew every step.
    """

    boundaries: tuple[int, ...]

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(count, length) of each run of neighbouring segments of one length: one batched call each."""
        lengths = (stop - start for start, stop in pairwise(self.boundaries))
        return [(sum(1 for _ in run), length) for length, run in groupby(lengths)]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [segments + 1], made once for all layers."""
        return torch.tensor(self.boundaries, dtype=torch.int32).to("cuda", non_blocking=True)

    @cached_property
    def longest(self) -> int:
        return max(length for _, length in self.runs)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    boundaries: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, Hq, T, D], key and value [B, Hkv, T, D] to [B, T, Hq, D]."""
    if boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert not kwargs.get("dropout"), "packed attention has no dropout"
    return attend_segments(query, key, value, boundaries, kwargs.get("scaling")), None


@torch.compiler.disable  # the calls depend on the documents' lengths: a graph of them would fit one batch only
def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Causal attention within each segment: [B, Hq, T, D], [B, Hkv, T, D] twice to [B, T, Hq, D]."""
    batch, num_heads, seq_len, _ = query.shape
    gqa = key.shape[1] != num_heads
    # [B, H, T, D] is a view of what the projections wrote as [B, T, H, D]: flat is free
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, H, D]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        # lazily: the kernel belongs to CUDA builds alone
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = segments.cu_seqlens, segments.longest
        causal = (-1, 0)
        out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=causal, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, seq_len))
    # split, not slices: its backward is one concatenation, that of a slice a full tensor of zeros for each segment
    sizes = [count * length for count, length in segments.runs]
    parts = [
        _attend_run(run_q, run_k, run_v, count, scale, gqa)
        for (count, _), run_q, run_k, run_v in zip(
            segments.runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        )
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, (batch, seq_len))


def _attend_run(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float | None, gqa: bool) -> Tensor:
    """`count` segments of equal length, [count * L, H, D] each, in one batched call to [count * L, Hq, D]."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, H, L, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


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
