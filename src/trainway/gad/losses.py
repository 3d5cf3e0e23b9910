"""What discriminator and student learn from a group of answers, as pure functions of scores and log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Largest log-ratio that is exponentiated. A larger one counts as this, e^20 = 5e8, and has no gradient: infinity, of
which fp32 makes one at 89, would turn even a clipped token's gradient of 0 into NaN."""


class BradleyTerry(NamedTuple):
    """The discriminator's loss over B prompts of n answers, and its gradient by each score."""

    loss: Tensor
    """Mean over all B * n pairs; 0-d."""
    d_teacher: Tensor  # [B]
    d_student: Tensor  # [B, n]


class PolicyStats(NamedTuple):
    """What a policy's loss is made of, 0-d each and without gradient: sums over tokens, but for the last."""

    policy: Tensor
    """The loss without the KL term."""
    kl: Tensor
    """k3 to the reference, before its coefficient; 0 where there is no reference."""
    clipped: Tensor
    """Number of tokens that a bound of the ratio leaves without a policy gradient."""
    ratio: Tensor
    entropy: Tensor
    """Nats; 0 where it is not given."""
    max_ratio: Tensor
    """A maximum over tokens; 0 of none."""


def bradley_terry(teacher: Tensor, student: Tensor) -> BradleyTerry:
    """Mean of softplus(S[b, i] - R[b]), the loss of GAD's discriminator (arXiv 2511.10643).

    teacher [B], student [B, n]; fp32, or fp64 of fp64. The gradients are in closed form, dL/dS = sigmoid(S - R) / (B n)
    and dL/dR = -sum_i dL/dS, so scores that came from other ranks or from no graph at all will do.
    """
    teacher, student = _at_least_fp32(teacher), _at_least_fp32(student)
    lead = teacher[:, None] - student  # [B, n]
    d_student = torch.sigmoid(-lead.detach()) / lead.numel()
    return BradleyTerry(
        loss=-F.logsigmoid(lead).mean(),  # F.softplus gives up digits of fp64 beyond 20
        d_teacher=-d_student.sum(1),
        d_student=d_student,
    )


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) within each row, std unbiased; [B, n], fp32, or fp64 of fp64 (GRPO, arXiv 2402.03300).

    rewards [B, n], a row for the answers to one prompt. A row of equal rewards gives exactly 0.
    """
    rewards = _at_least_fp32(rewards)
    # A sum of equal numbers divided by their count can be a rounding off, as large as eps; std_mean's running mean
    # (Welford's) of equal numbers is that number.
    std, mean = torch.std_mean(rewards, dim=1, keepdim=True)
    return (rewards - mean) / (std + eps)


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    *,
    clip_range: float,
    kl_coef: float,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Sum over tokens of -min(ratio A, clip(ratio) A) + kl_coef k3, 0-d; and what it is made of.

    ratio = exp(logp - old_logp), clipped to 1 - clip_range .. 1 + clip_range (PPO, arXiv 1707.06347, equation 7);
    k3 = exp(q) - q - 1 with q = ref_logp - logp, an unbiased estimate of KL(policy, reference) on the policy's own
    samples (Schulman 2020, joschu.net/blog/kl-approx.html). Under dual_clip the term of a negative A is at most
    -dual_clip A, however large the ratio (arXiv 1912.09729). Log-ratios and q end at LOG_RATIO_LIMIT.

    All [N], one for each token: logp with gradient; advantages; old_logp of the policy that sampled, None where that is
    this one, so that every ratio is 1; ref_logp, None only without a kl_coef; entropy, for the statistics alone.
    """
    assert ref_logp is not None or not kl_coef, "a KL term needs the reference's log-probabilities"
    old_logp = logp.detach() if old_logp is None else old_logp
    ratio = _bounded_exp(logp - old_logp)
    terms = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        terms = torch.where(advantages < 0, torch.min(terms, -dual_clip * advantages), terms)
    policy = terms.sum()
    loss, kl = policy, policy.new_zeros(())
    if ref_logp is not None:
        kl = _k3(logp, ref_logp).sum()
        loss = policy + kl_coef * kl if kl_coef else policy
    with torch.no_grad():
        clipped = _clipped(ratio, advantages, clip_range, dual_clip).sum().to(policy.dtype)
        max_ratio = torch.cat([ratio, ratio.new_zeros(1)]).amax()
        entropy_sum = torch.zeros_like(kl) if entropy is None else entropy.sum()
    stats = PolicyStats(policy, kl, clipped, ratio.sum(), entropy_sum, max_ratio)
    return loss, PolicyStats(*(value.detach() for value in stats))


def pool_stats(stats: Tensor) -> PolicyStats:
    """The statistics of all micro-batches and ranks together, of those of each: [m, 6], in PolicyStats' order."""
    assert PolicyStats._fields[-1] == "max_ratio"
    return PolicyStats(*torch.cat([stats[:, :-1].sum(0), stats[:, -1:].amax(0)]))


def _k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    log_ratio = (ref_logp - logp).clamp(max=LOG_RATIO_LIMIT)
    return log_ratio.expm1() - log_ratio


def _clipped(ratio: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None) -> Tensor:
    held = (advantages > 0) & (ratio > 1 + clip_range) | (advantages < 0) & (ratio < 1 - clip_range)
    if dual_clip is not None:
        held |= (advantages < 0) & (ratio > dual_clip)
    return held


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


def _at_least_fp32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
