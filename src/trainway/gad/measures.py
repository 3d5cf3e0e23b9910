"""The figures of adversarial distillation: how near the student's answers come to the teacher's, and what a step did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainway.gad.words import word_splitter

EQUAL_REWARDS = 1e-6
"""Rewards of a group within this of each other count as equal: the advantage adds as much to their deviation before it
divides by it, so what is left of such a group is rounding."""


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L of two texts, from 0 to 1: the F1 of their longest common subsequence of words (Lin 2004, section 3.2).

    Words are those of Google's rouge_score without its stemmer, so that figures compare with published ones; see
    `word_splitter` for what a reference in another script is measured by. 0 where either text has no words.
    """
    words = word_splitter(reference)
    found, wanted = words(candidate), words(reference)
    common = _longest_common_subsequence(found, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def distinct_n(answers: Sequence[np.ndarray], n: int) -> float:
    """Different n-grams as a share of all n-grams in `answers` together ([T] tokens each; Li et al. 2016, arXiv
    1510.03055, section 5); 0 where there are none. More answers have a lower share: compare equal sets of prompts."""
    grams = [np.lib.stride_tricks.sliding_window_view(tokens, n) for tokens in answers if len(tokens) >= n]
    if not grams:
        return 0.0
    windows = np.concatenate(grams).astype(np.int64)  # [N, n]
    span = int(windows.max()) + 1
    keys = windows[:, 0]
    for column in windows.T[1:]:
        # numbered anew each time, so that no key outgrows 64 bits
        keys = np.unique(keys, return_inverse=True)[1] * span + column
    return len(np.unique(keys)) / len(windows)


def repetition(tokens: np.ndarray, n: int = 4) -> float:
    """Share of an answer's n-grams that it has said before (Welleck et al. 2019, arXiv 1908.04319, seq-rep-n)."""
    return 1.0 - distinct_n([tokens], n) if len(tokens) >= n else 0.0


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Pearson's correlation of scores and lengths, 0 where either is all equal (see `EQUAL_REWARDS`).

    [N] of each, or [B, n] for groups of answers: those are measured from the mean of their own group, since only what
    differs within a group moves the policy.
    """
    x, y = (_from_group_mean(values) for values in (scores, lengths))
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


class GroupSpread(NamedTuple):
    """How much the rewards of a prompt's answers differ."""

    collapsed: float
    """Share of groups whose rewards are all equal, which teach nothing."""
    std: float
    """Unbiased standard deviation within a group, mean over groups."""


def group_spread(rewards: np.ndarray) -> GroupSpread:
    """The spread of rewards [B, n], n >= 2."""
    rewards = rewards.astype(np.float64)
    collapsed = np.ptp(rewards, axis=1) <= EQUAL_REWARDS
    return GroupSpread(float(collapsed.mean()), float(rewards.std(axis=1, ddof=1).mean()))


def pair_accuracy(teacher_scores: np.ndarray, scores: np.ndarray) -> float:
    """Share of pairs in which the teacher's answer is scored above the student's; equal scores count half.

    teacher_scores [B], scores [B, n] or [B].
    """
    above = teacher_scores.reshape(len(teacher_scores), -1) - scores.reshape(len(scores), -1)
    return float(np.heaviside(above, 0.5).mean())


class Answer(NamedTuple):
    """The student's answer to a prompt of the validation split, beside the teacher's."""

    tokens: np.ndarray
    """[T] of the student's, the end token included."""
    text: str
    truncated: bool
    """The student was cut off before it came to an end."""
    teacher_length: int
    """Tokens of the teacher's, the end token included."""
    teacher_text: str
    score: float | None = None
    """The discriminator's, of the student's; None where there is no discriminator."""
    teacher_score: float | None = None


def answer_measures(
    share: Sequence[Answer],
    tokens_of_all: Sequence[np.ndarray],
    sum_over_ranks: Callable[..., list[float]],
) -> dict[str, float]:
    """The figures of a validation. Every rank calls it together, and all get the same.

    Args:
        share: this rank's part of the answers, dealt in any way.
        tokens_of_all: the student's tokens of all ranks' answers: what is said twice on two ranks no sum can tell.
        sum_over_ranks: as `World.sum`.

    Returns:
        val/rouge_l: mean over answers. val/length, val/teacher_length: mean tokens. val/distinct_2: of all answers
        together. val/repetition: mean share of 4-grams said before. val/truncated: share. With a discriminator:
        val/discriminator_accuracy, val/student_score and val/teacher_score, means.
    """
    scored = [
        (answer.teacher_score, answer.score)
        for answer in share
        if answer.score is not None and answer.teacher_score is not None
    ]
    teacher_scores, scores = np.array(scored, dtype=np.float64).reshape(-1, 2).T
    sums = {
        "val/rouge_l": math.fsum(rouge_l(answer.text, answer.teacher_text) for answer in share),
        "val/length": sum(len(answer.tokens) for answer in share),
        "val/teacher_length": sum(answer.teacher_length for answer in share),
        "val/repetition": math.fsum(repetition(answer.tokens) for answer in share),
        "val/truncated": sum(answer.truncated for answer in share),
    }
    judged = {
        "val/discriminator_accuracy": pair_accuracy(teacher_scores, scores) * len(scored) if scored else 0.0,
        "val/student_score": math.fsum(scores),
        "val/teacher_score": math.fsum(teacher_scores),
    }
    count, count_scored, *totals = sum_over_ranks(len(share), len(scored), *sums.values(), *judged.values())
    means = {name: total / count for name, total in zip(sums, totals[: len(sums)], strict=True)}
    means["val/distinct_2"] = distinct_n(tokens_of_all, 2)
    if count_scored:
        means |= {name: total / count_scored for name, total in zip(judged, totals[len(sums) :], strict=True)}
    return means


def step_measures(
    *,
    scores: np.ndarray,
    teacher_scores: np.ndarray,
    lengths: np.ndarray,
    teacher_lengths: np.ndarray,
    truncated: np.ndarray,
    policy_tokens: float = 0.0,
    policy_sums: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The figures of a training step, from the answers and sums of all ranks.

    Args:
        scores, lengths, truncated: [B, n], of the student's answers; scores are those from before the discriminator's
            update, lengths in tokens with the end token.
        teacher_scores, teacher_lengths: [B].
        policy_tokens: tokens that the sums of the policy are over; 0 where no policy was trained.
        policy_sums: by name, such as kl, entropy and clipped: summed over tokens and ranks.
        seconds: by phase: rollout, score, discriminator, student.

    Returns:
        gad/discriminator_loss: Bradley-Terry, nats per pair. gad/discriminator_accuracy: share of pairs, ties half.
        gad/margin: mean of teacher's less student's score. gad/teacher_score, gad/student_score. gad/reward_std and
        gad/collapsed_groups: see `GroupSpread`. gad/score_length_correlation: see `length_correlation`.
        gad/response_length, gad/response_length_std, gad/teacher_length: tokens. gad/truncated, gad/empty: shares of
        answers. gad/NAME: each of policy_sums per token. gad/PHASE_s: seconds.
    """
    differences = scores.astype(np.float64) - teacher_scores.astype(np.float64)[:, None]  # [B, n]
    spread = group_spread(scores)
    figures = {
        "discriminator_loss": np.logaddexp(0.0, differences).mean(),
        "discriminator_accuracy": pair_accuracy(teacher_scores, scores),
        "margin": -differences.mean(),
        "teacher_score": teacher_scores.mean(dtype=np.float64),
        "student_score": scores.mean(dtype=np.float64),
        "reward_std": spread.std,
        "collapsed_groups": spread.collapsed,
        "score_length_correlation": length_correlation(scores, lengths),
        "response_length": lengths.mean(),
        "response_length_std": lengths.std(),
        "teacher_length": teacher_lengths.mean(),
        "truncated": truncated.mean(),
        # an end token alone
        "empty": ((lengths <= 1) & ~truncated.astype(bool)).mean(),
    }
    if policy_tokens:
        figures |= {name: total / policy_tokens for name, total in (policy_sums or {}).items()}
    figures |= {f"{phase}_s": value for phase, value in (seconds or {}).items()}
    return {f"gad/{name}": float(value) for name, value in figures.items()}


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of it, 64 cells of the dynamic programme at a time: a column is one integer of len(a) bits, with a 0 where
    it rises (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = column = (1 << len(a)) - 1
    for word in b:
        if matches := column & places.get(word, 0):
            column = ((column + matches) | (column - matches)) & every
    return len(a) - column.bit_count()


def _from_group_mean(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    if not values.size:
        return values
    differ = np.ptp(values, axis=-1, keepdims=True) > EQUAL_REWARDS
    return np.where(differ, values - values.mean(axis=-1, keepdims=True), 0.0)
