"""Fused elementwise parts of Llama-like blocks for CPUs, where passes over memory cost a fifth of a step."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from trainway.models.segments import Segments, attend_segments


def fuse_blocks(model: PreTrainedModel) -> None:
    """Replaces the forward of the norms, the feed-forward layers and the attentions of `model` that are known to compute
    the same; weights, adapters on them and every other module stay as they are.

    A fused forward runs only while training in fp32 on a CPU, uncompiled; in every other case transformers' own runs.
    """
    for module in model.modules():
        fused = _fused_forward(module)
        if fused is not None:
            module.forward = MethodType(fused, module)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); x [..., H], weight [H]."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), keeping its two inputs only."""
    return _SwiGLU.apply(gate, up)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout (Su et al. 2021); x [B, H, T, D], cos and sin [B, T, D]."""
    return _Rotary.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        product = (grad * x).reshape(-1, width)  # [N, H]; its two weighted sums are matrix-vector products
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = rstd.view(1, -1).mm(product).view(-1).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weight = weight.to(x.dtype)  # a frozen one may be bf16
            slope = product.mv(weight).view(rstd.shape).mul_(rstd.pow(3)).div_(width)
            d_x = (grad * weight).mul_(rstd).addcmul_(x, slope, value=-1.0)
        return d_x, d_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        d_silu = grad * up
        return torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_silu), d_up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None  # the transpose turns the other way


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)[..., :half]  # both halves of a table are equal
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    if not _fusible(hidden_states):
        return type(module).forward(module, hidden_states)
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)  # type: ignore[arg-type]


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    if not _fusible(x):
        return type(module).forward(module, x)
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))


def _attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    boundaries: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if boundaries is None or not _fusible(hidden_states):
        kwargs |= {} if boundaries is None else {"boundaries": boundaries}
        return type(module).forward(
            module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)  # [B, T, heads, D]
    q, k, v = (
        project(hidden_states).view(heads) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = (rotary(x.transpose(1, 2), *position_embeddings) for x in (q, k))
    v = v.transpose(1, 2)
    out = attend_segments(q, k, v, boundaries, module.scaling, _window(module))  # [B, T, heads, D]
    return module.o_proj(out.flatten(2)), None


def _window(module: Any) -> int | None:
    """The sliding window that transformers' own forward hands on."""
    match type(module).__name__:
        case "LlamaAttention" | "GraniteAttention":
            return None
        case "MistralAttention" | "MixtralAttention":
            return getattr(module.config, "sliding_window", None)
        case _:
            return module.sliding_window


def _fusible(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _fused_forward(module: Any) -> Callable[..., Any] | None:
    package, _, name = type(module).__module__.rpartition(".")
    family = package.removeprefix("transformers.models.")
    if family not in _FUSED or name != f"modeling_{family}":
        return None
    prefix, parts = _FUSED[family]
    part = type(module).__name__.removeprefix(prefix)
    if part not in parts:
        return None
    if part == "MLP" and type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    if part == "Attention" and module.attention_dropout:
        return None
    return _FORWARDS[part]


_FORWARDS: dict[str, Callable[..., Any]] = {
    "RMSNorm": _norm_forward,
    "MLP": _mlp_forward,
    "Attention": _attention_forward,
}

_ALL = frozenset(_FORWARDS)
_FUSED: dict[str, tuple[str, frozenset[str]]] = {
    "deepseek_v3": ("DeepseekV3", _ALL - {"Attention"}),
    "gpt_oss": ("GptOss", frozenset({"RMSNorm"})),
    "granite": ("Granite", _ALL),
    "llama": ("Llama", _ALL),
    "mistral": ("Mistral", _ALL),
    "mixtral": ("Mixtral", _ALL - {"MLP"}),
    "olmo2": ("Olmo2", _ALL - {"Attention"}),
    "phi3": ("Phi3", frozenset({"RMSNorm"})),
    "qwen2": ("Qwen2", _ALL),
    "qwen3": ("Qwen3", _ALL),
    "qwen3_moe": ("Qwen3Moe", _ALL),
    "smollm3": ("SmolLM3", _ALL - {"Attention"}),
}
"""What is fused of each family of transformers' models: the classes' common prefix, and the parts that tests hold equal
to transformers' own."""
