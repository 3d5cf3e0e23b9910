"""Optimisers: fused AdamW, Muon for the blocks' matrices, gradient clipping and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trainway.config.schema import OptimConfig
from trainway.errors import ConfigError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients with the steepest slope at zero (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/)."""


def build_optimizers(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers of a run, each parameter in exactly one of them; every group carries its `peak_lr`.

    adamw: one AdamW. muon: Muon for the blocks' matrices, then AdamW for the rest. Vectors have no weight decay.
    Raises ConfigError when nothing is trainable.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter is trainable", "an optimiser needs at least one", "unfreeze part of the model"
        )
    by_muon = [p for name, p in trainable if config.name == "muon" and _is_block_matrix(name, p)]
    taken = {id(p) for p in by_muon}
    rest = [p for _, p in trainable if id(p) not in taken]
    groups = [
        {
            "params": [p for p in rest if p.ndim >= 2],
            "weight_decay": config.weight_decay,
            "peak_lr": config.lr,
        },
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak_lr": config.lr},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        muon = {"params": by_muon, "peak_lr": config.muon_lr}
        optimizers.append(Muon([muon], config.muon_lr, config.muon_momentum, config.muon_weight_decay))
    if rest:
        used = [group for group in groups if group["params"]]
        optimizers.append(
            torch.optim.AdamW(used, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        )
    return optimizers


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Sets each group's rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """The global L2 norm of the gradients before clipping, 0-d; scales them down to `max_norm`, 0 only measures."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # CPU knows the norm without waiting, and saves a pass over the gradients; CUDA multiplies by 1 instead
    if max_norm > 0 and not (total.device.type == "cpu" and total <= max_norm):
        torch._foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz; decoupled weight decay (Keller Jordan 2024).

    Takes matrices only. An update is scaled by sqrt(max(1, rows / columns)). State: one `momentum_buffer` each.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), (
            "Muon takes matrices only"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault((p.shape, p.device), []).append(p)
            for parameters in same_shape.values():
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        for p, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(gradient)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        directions = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))  # [n, rows, columns]
        rows, columns = parameters[0].shape
        updates = orthogonalize(directions).to(parameters[0].dtype)
        if weight_decay:
            torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix [n, rows, columns] = U S V^T, singular values within about 0.7 to 1.2.

    bf16 on CUDA; elsewhere the matrices' own type, since CPUs multiply fp32 faster.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and not any(part in name for part in ("embed_tokens", "lm_head"))
