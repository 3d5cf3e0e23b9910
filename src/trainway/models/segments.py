"""Causal attention within the segments of packed rows: one call for each run of segments of one length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trainway.models.sinks import flash_with_sinks_on_cpu, flash_with_sinks_on_cuda


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

    @cached_property
    def _bands(self) -> dict[tuple[int, int | None], Tensor]:
        return {}

    def band(self, length: int, window: int | None, device: torch.device) -> Tensor:
        """Which keys a query of one segment sees, itself the newest of `window`: bool [L, L], kept for all layers."""
        if (length, window) not in self._bands:
            band = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
            self._bands[length, window] = band if window is None else band.triu_(1 - window)
        return self._bands[length, window]


@torch.compiler.disable  # the calls depend on the documents' lengths: a graph of them would fit one batch only
def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each segment: [B, Hq, T, D], [B, Hkv, T, D], [B, Hkv, T, Dv] to [B, T, Hq, Dv].

    window: a token sees so many tokens, itself among them. softcap: scores s become softcap * tanh(s / softcap)
    (Gemma 2, arXiv 2408.00118, section 2). sinks [Hq]: scores of a key without a value that every query sees.
    """
    batch, _, seq_len, width = query.shape
    value_width = value.shape[-1]
    if value_width != width:  # the fused kernels know one width; zeros change nothing
        scale = width**-0.5 if scale is None else scale
        widest = max(width, value_width)
        query, key, value = (F.pad(x, (0, widest - x.shape[-1])) for x in (query, key, value))
    if torch.is_autocast_enabled(query.device.type):
        # rotary embedding leaves q and k in fp32 and v as it came; scaled_dot_product_attention would cast as well
        lower = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    # [B, T, H, D] is how the projections wrote it, [B, H, T, D] a view: flat is free
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, H, D]
    if softcap is None and _has_flash(q):
        out = _attend_all(q, k, v, segments, scale, window, sinks)
    else:
        # split, not slices: its backward is one concatenation, that of a slice a full tensor of zeros for each segment
        sizes = [count * length for count, length in segments.runs]
        parts = [
            _attend_run(run_q, run_k, run_v, run, segments, scale, window, softcap, sinks)
            for run, run_q, run_k, run_v in zip(
                segments.runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True
            )
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[..., :value_width].unflatten(0, (batch, seq_len))


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by its definition, scores and all: [N, Hq, L, D], [N, Hkv, S, D] twice to [N, Hq, L, D].

    mask: True, or 0 to be added, where a query sees a key; it broadcasts to [N, Hq, L, S].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    stat_type = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(stat_type)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(stat_type).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return probs.to(v.dtype) @ v


def _has_flash(q: Tensor) -> bool:
    width = q.shape[-1]
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256


def _attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """All segments in one call on a GPU: [B * T, H, D] each to [B * T, Hq, D]."""
    cu, longest = segments.cu_seqlens, segments.longest
    left = -1 if window is None or window >= longest else window - 1  # keys before the query's own
    if sinks is not None:
        return flash_with_sinks_on_cuda(q, k, v, sinks, cu, longest, scale, left)
    # lazily: the kernel belongs to CUDA builds alone
    from torch.nn.attention.varlen import varlen_attn

    gqa = k.shape[1] != q.shape[1]
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out


def _attend_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run: tuple[int, int],
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`count` segments of equal length, [count * L, H, D] each, in one batched call to [count * L, Hq, D]."""
    count, length = run
    if window is not None and window >= length:
        window = None
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, H, L, D]
    band = None if window is None else segments.band(length, window, q.device)
    if softcap is not None or (sinks is not None and q.is_cuda):
        seen = segments.band(length, window, q.device)
        out = attend_plainly(q, k, v, seen, scale, softcap, sinks)
    elif sinks is not None:
        out = flash_with_sinks_on_cpu(q, k, v, sinks, band, scale)
    else:
        gqa = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scale, enable_gqa=gqa
        )
    return out.transpose(1, 2).flatten(0, 1)
