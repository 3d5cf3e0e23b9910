"""Attention sinks on top of flash kernels that know none, with exact gradients of queries, keys, values and sinks.

A sink is a key without a value (gpt-oss, arXiv 2508.10925). With lse the logsumexp of a query's scores, lse' =
log(exp(lse) + exp(sink)) and o' = o * exp(lse - lse'). A flash backward pass makes the probabilities anew from the
logsumexp that it is given, P = exp(S - lse), and D = rowsum(do * o) (Dao 2023, arXiv 2307.08691, algorithm 2); given
o' and lse' it therefore returns the gradients of the attention with the sink, whose own is -sum(exp(sink - lse') * D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def flash_with_sinks_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, band: Tensor | None, scale: float | None
) -> Tensor:
    """[N, Hq, L, D], [N, Hkv, L, D] twice and sinks [Hq] to [N, Hq, L, D]; `band` bool [L, L], or causal without."""
    mask = None if band is None else torch.zeros_like(band, dtype=q.dtype).masked_fill_(~band, -torch.inf)
    out: Tensor = _SinksOnCPU.apply(q, k, v, sinks, mask, scale)
    return out


def flash_with_sinks_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None,
    left: int,
) -> Tensor:
    """[T, Hq, D], [T, Hkv, D] twice and sinks [Hq] to [T, Hq, D]; a query sees `left` keys before its own, -1 for all."""
    out: Tensor = _SinksOnCUDA.apply(q, k, v, sinks, cu_seqlens, longest, scale, left)
    return out


class _SinksOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )  # [N, Hq, L, D], [N, Hq, L]
        out, lse = _with_sinks(out, lse, sinks[:, None])
        ctx.save_for_backward(q, k, v, sinks, mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
        )
        return d_q, d_k, d_v, _sink_gradient(grad, out, lse, sinks[:, None]), None, None


class _SinksOnCUDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float | None,
        left: int,
    ) -> Tensor:
        ctx.window = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        ctx.longest, ctx.is_causal = longest, left == -1
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, ctx.is_causal, False, **ctx.window
        )  # [T, Hq, D], [Hq, T]
        out, lse = _with_sinks(out, lse.T, sinks)
        lse = lse.T.contiguous()
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, cu_seqlens, out, lse = ctx.saved_tensors
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, ctx.longest, ctx.longest, 0.0, ctx.is_causal,
            *no_dropout, **ctx.window,
        )  # fmt: skip
        return d_q, d_k, d_v, _sink_gradient(grad, out, lse.T, sinks), None, None, None, None


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., D] and logsumexp [...] with the sinks' share; not in place: checkpointing may keep what it is given."""
    full = torch.logaddexp(lse, sinks.to(lse.dtype))
    return out * (lse - full).exp().unsqueeze(-1).to(out.dtype), full


def _sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[Hq], in the sinks' type; `sinks` as it broadcasts to lse [...]."""
    delta = (grad * out).sum(-1, dtype=lse.dtype)  # [...]
    pull = (sinks.to(lse.dtype) - lse).exp() * delta
    return -pull.sum_to_size(sinks.shape).flatten().to(sinks.dtype)
