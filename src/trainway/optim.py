"""Optimisers: which parameter belongs to fused AdamW and which to Muon; gradient clipping and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from trainway.config.schema import OptimConfig
from trainway.errors import ConfigError
from trainway.muon import Muon, Spread


def build_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimConfig,
    spread: Spread | None = None,
    num_rows: Callable[[Tensor], int] = len,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a run, each parameter in exactly one of them; every group carries its `peak_lr`.

    adamw: one AdamW. muon: Muon for the blocks' matrices, then AdamW for the rest. Vectors have no weight decay.
    `spread` and `num_rows`: where the rows of Muon's matrices lie, and how many a whole one has (see `Muon`).
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
        optimizers.append(
            Muon(
                [muon],
                config.muon_lr,
                config.muon_momentum,
                config.muon_weight_decay,
                spread=spread,
                num_rows=num_rows,
            )
        )
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
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, spread: Spread | None = None) -> Tensor:
    """The global L2 norm of the gradients before clipping, 0-d; scales them down to `max_norm`, 0 only measures.

    spread: the ranks over which the rows of every gradient lie; empty where this one holds them whole.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if spread is not None and spread.shards is not None:
        squares = total.square().to(spread.device or total.device)
        dist.all_reduce(squares, group=spread.shards)
        total = squares.sqrt().to(total.device)
    # CPU knows the norm without waiting, and saves a pass over the gradients; CUDA multiplies by 1 instead
    if max_norm > 0 and not (total.device.type == "cpu" and total <= max_norm):
        torch._foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and not any(part in name for part in ("embed_tokens", "lm_head"))
