"""Drawing tokens: a random number of its own for every answer and position, and the token that it means."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128
"""Tokens whose probabilities are summed before any is looked at: a running sum over a vocabulary takes longer than all
the rest."""

_HEAD = 1024
"""The likeliest tokens, among which the share of top_p is looked for first."""


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A double in [0, 1) for each answer: what its `seeds` (uint64 [B]) give at `positions` (integers [B], from 0).

    It is output number `positions` of SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number
    generators, figure 17), whose state only counts: nothing has to be drawn before, and no answer shares a stream.
    """
    z = seeds + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53  # the 53 bits that a double holds


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token [B] int64 of each row of logits [B, V], by inversion: the first whose cumulative share exceeds `uniform`.

    uniform: float64 [B] in [0, 1). top_p: only the smallest set of likeliest tokens with this share counts; of equally
    likely ones all or none. Rows do not depend on each other: sums are taken within a row, in an order that depends on
    the vocabulary alone, and those over it in fp64. Temperature 0: the likeliest token, the first of equal ones.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)  # [B, V]
    if top_p < 1:
        probs = _likeliest(probs, top_p)
    short = -probs.shape[-1] % _BLOCK
    blocks = (F.pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, _BLOCK))  # [B, V / 128, 128]
    running = blocks.sum(-1).double().cumsum(-1)
    target = uniform * running[:, -1]
    block = _first_above(running, target)  # [B, 1]
    before = F.pad(running, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(-1)
    return (block * _BLOCK + _first_above(inside, target - before[:, 0]))[:, 0]


def _likeliest(probs: Tensor, top_p: float) -> Tensor:
    """`probs` [B, V] with 0 for all that top_p leaves out (Holtzman et al. 2020, arXiv 1904.09751)."""
    vocabulary = probs.shape[-1]
    if probs.device.type == "cpu" and vocabulary > _HEAD:
        # to sort a vocabulary takes a CPU as long as the model
        falling = probs.topk(_HEAD).values
        mass = falling.double().cumsum(-1)
        if (mass[:, -1] >= top_p).all():
            return _kept(probs, falling, mass, top_p)
    falling = probs.sort(-1, descending=True).values
    return _kept(probs, falling, falling.double().cumsum(-1), top_p)


def _kept(probs: Tensor, falling: Tensor, mass: Tensor, top_p: float) -> Tensor:
    reached = (mass < top_p).sum(-1, keepdim=True)  # the token with which the share is full
    least = falling.gather(-1, reached.clamp_(max=falling.shape[-1] - 1))
    return probs.masked_fill(probs < least, 0.0)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """Index [B, 1] of the first of the rising sums [B, N] above the target [B].

    Where rounding has put the target at or above the last sum, the last index that has a share: never one without.
    """
    above = (running <= target[:, None]).sum(-1, keepdim=True)
    last = (running < running[:, -1:]).sum(-1, keepdim=True)
    return above.minimum(last)
