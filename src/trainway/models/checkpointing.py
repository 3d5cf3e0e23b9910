"""Activation checkpointing: what of a block's forward pass is kept, and what its backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

_KEPT = {"mm", "addmm", "bmm", "baddbmm", "_varlen_attn", "_flash_attention_forward"}


def checkpoint_activations(blocks: Iterable[nn.Module], policy: Literal["selective", "full"]) -> None:
    """Make each block keep only its input (`full`), or the results of matrix products and attention too (`selective`).

    Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198. Apply before a block is compiled or
    sharded. Gradients stay the same, bit for bit.
    """
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, policy)


def _checkpointed(forward: Callable[..., Any], policy: str, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = _selective_contexts if policy == "selective" else noop_context_fn
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_choose)


def _choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2].partition(".")[0]
    if name in _KEPT or name.startswith("_scaled_dot_product"):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
