"""What goes wrong in adversarial distillation: how each fault shows in the figures, its likely cause and its cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trainway.gad.recent import (
    ACCURACY,
    COLLAPSED,
    CORRELATION,
    EMPTY,
    ENTROPY,
    KL,
    LENGTH,
    LOSS,
    MARGIN,
    TEACHER_LENGTH,
    TRUNCATED,
    WINDOW,
    Recent,
)

SATURATED_ACCURACY = 0.99
"""Of pairs; answers alike in form are not told apart so surely for long: that takes a mark which each of them bears."""
SATURATED_LOSS = 0.05
"""Nats; at it a pair's gradient, 1 - exp(-loss), is a tenth of what it is where both are scored alike."""
LEARNT_ACCURACY = 0.55
"""0.5 is guessing; over a window's thousands of pairs this is not reached by luck."""
OUTRUN_ACCURACY = 0.4
"""One that keeps up wavers about 0.5 where it cannot tell; here it is mistaken more often than luck would have it."""
LEARNING_STEPS = 100
"""The discriminator's own steps come first and are ten: one that has not learnt in ten times as many will not."""
PLAIN_LENGTH_FACTOR = 1.5
PLAIN_TRUNCATED = 0.5
"""Answers so much longer or shorter than the teacher's, or so often without an end, are told apart at a glance."""
HACKED_LENGTH_FACTOR = 1.2
HACKED_GROWTH = 1.05
HACKED_CORRELATION = 0.2
"""Growing to the teacher's length is learning, and longer answers may score higher meanwhile; beyond it they may not."""
COLLAPSED_GROUPS = 0.5
"""Half of what the rollouts cost teaches nothing."""
MOSTLY_TRUNCATED = 0.9
"""A student that has learnt to end does so in most answers, even where data.max_response_tokens is scant."""
OFTEN_EMPTY = 0.1
"""Teachers have something to say; one answer in ten is no accident of sampling."""
KL_LIMIT = 1.0
"""Nats per token: the student says what it would have said e times less likely, token after token, when it began."""
ENTROPY_SHARE = 0.2
ENTROPY_LIMIT = 0.2
"""A share of what it was, and nats per token: a student of a sure teacher may become sure, but not so far from where
the warm-up, which taught it the same, has left it."""
RELIEF = 0.8
"""What was raised is gone when it is under this share of its limit: what wavers about the limit is said once."""


class Alarm(NamedTuple):
    """One thing that goes wrong."""

    name: str
    needs: tuple[str, ...]
    """Figures of which a window must be known."""
    holds: Callable[[Recent], bool]
    gone: Callable[[Recent], bool]
    says: Callable[[Recent], str]
    patience: int = 1
    """Steps in a row for which it must hold."""


# ---- the discriminator


def _is_saturated(recent: Recent) -> bool:
    return recent.mean(ACCURACY) >= SATURATED_ACCURACY and recent.mean(LOSS) < SATURATED_LOSS


def _no_longer_saturated(recent: Recent) -> bool:
    return recent.mean(LOSS) > SATURATED_LOSS / RELIEF


def _saturated_says(recent: Recent) -> str:
    what = (
        f"the discriminator tells {recent.mean(ACCURACY):.1%} of the student's answers from the teacher's "
        f"(loss {recent.mean(LOSS):.3g}), and its score leads nowhere"
    )
    if recent.mean(TRUNCATED) >= PLAIN_TRUNCATED:
        cause = f"likely by the missing end: {recent.mean(TRUNCATED):.0%} of the answers are cut off"
    else:
        cause = "likely by their form: the token at their end, white space, a template that the other has not"
    return (
        f"{what}; {cause}. Compare them in samples.jsonl, and the teacher's tokens by `trainway data inspect`; "
        "if they are alike, lower gad.discriminator_lr"
    )


def _learns_nothing(recent: Recent) -> bool:
    if not 1 - LEARNT_ACCURACY <= recent.mean(ACCURACY) <= LEARNT_ACCURACY:
        return False
    # one that has learnt and guesses now was made to guess, which is the aim, unless it misses what anyone sees
    return recent.best_accuracy <= LEARNT_ACCURACY or _plainly_differ(recent)


def _plainly_differ(recent: Recent) -> bool:
    factor = recent.length_factor
    return (
        not 1 / PLAIN_LENGTH_FACTOR < factor < PLAIN_LENGTH_FACTOR
        or recent.mean(TRUNCATED) >= PLAIN_TRUNCATED
    )


def _learns_again(recent: Recent) -> bool:
    return recent.mean(ACCURACY) > LEARNT_ACCURACY


def _learns_nothing_says(recent: Recent) -> str:
    return (
        f"the discriminator guesses (accuracy {recent.mean(ACCURACY):.1%} for {LEARNING_STEPS + WINDOW} steps), though "
        f"the answers differ ({recent.mean(LENGTH):.0f} tokens, the teacher's {recent.mean(TEACHER_LENGTH):.0f}); "
        "likely gad.discriminator_lr is too low. Raise it, or lengthen gad.discriminator_only_steps"
    )


def _outrun_says(recent: Recent) -> str:
    return (
        f"the discriminator prefers the student's answers to the teacher's (accuracy {recent.mean(ACCURACY):.1%} for "
        f"{LEARNING_STEPS + WINDOW} steps): likely it learns too slowly, and the student its weak spots. Raise "
        "gad.discriminator_lr or lower optim.lr, from a checkpoint before it began"
    )


# ---- lengths


def _is_hacked(recent: Recent) -> bool:
    if not (recent.is_adversarial and recent.has_trend):
        return False
    (shorter, longer), (before, after) = recent.halves(LENGTH), recent.halves(MARGIN)
    return (
        recent.length_factor >= HACKED_LENGTH_FACTOR
        and longer >= HACKED_GROWTH * shorter
        and recent.mean(CORRELATION) >= HACKED_CORRELATION
        # of scores only differences mean something: the student's rises when it comes nearer the teacher's
        and after < before
    )


def _no_longer_hacked(recent: Recent) -> bool:
    return recent.length_factor < 1 + RELIEF * (HACKED_LENGTH_FACTOR - 1)


def _hacked_says(recent: Recent) -> str:
    return (
        f"answers grow ({recent.mean(LENGTH):.0f} tokens, {recent.length_factor:.2f} times the teacher's) and score "
        f"higher for it (correlation {recent.mean(CORRELATION):.2f}): likely the discriminator is too slow to follow. "
        "Raise gad.discriminator_lr or lower optim.lr, from a checkpoint before it began"
    )


def _truncated_says(recent: Recent) -> str:
    what = f"{recent.mean(TRUNCATED):.0%} of the answers are cut off at {recent.mean(LENGTH):.0f} tokens"
    if recent.length_factor < 1 / RELIEF:
        return f"{what}, and the teacher's are about as long: raise data.max_response_tokens"
    return (
        f"{what}, the teacher's have {recent.mean(TEACHER_LENGTH):.0f}: likely the student has not learnt to end its "
        "turn. Lengthen stage warmup; if that does not help, see that the chat template ends a turn with a token of its "
        "own"
    )


def _empty_says(recent: Recent) -> str:
    return (
        f"{recent.mean(EMPTY):.0%} of the answers are empty: likely the discriminator prefers them to the student's "
        "words, or the prompts end where the answer should. Look at samples.jsonl; lower optim.lr, or begin from an "
        "earlier checkpoint"
    )


def _collapsed_says(recent: Recent) -> str:
    return (
        f"in {recent.mean(COLLAPSED):.0%} of the groups all answers score the same, and nothing is learnt from them: "
        "likely the student repeats itself. Raise rollout.temperature or lower optim.lr"
    )


# ---- the policy


def _kl_says(recent: Recent) -> str:
    return (
        f"the student has gone far from where the stage began (KL {recent.typical(KL):.3g} nats per token): likely its "
        "language breaks. Look at samples.jsonl; lower optim.lr or raise gad.kl_coef, from a checkpoint before it began"
    )


def _is_sure_of_itself(recent: Recent) -> bool:
    return recent.typical(ENTROPY) < _entropy_limit(recent)


def _entropy_limit(recent: Recent) -> float:
    assert recent.first_entropy is not None
    return min(ENTROPY_LIMIT, ENTROPY_SHARE * recent.first_entropy)


def _entropy_says(recent: Recent) -> str:
    return (
        f"the student's answers no longer vary (entropy {recent.typical(ENTROPY):.3g} nats per token, "
        f"{recent.first_entropy:.3g} when the stage began): likely it found one answer that scores well. "
        "Lower optim.lr or raise gad.kl_coef, from a checkpoint before it began"
    )


def _share_alarm(
    name: str, figure: str, limit: float, says: Callable[[Recent], str], *, policy_only: bool = False
) -> Alarm:
    return Alarm(
        name,
        (figure, LENGTH, TEACHER_LENGTH),
        holds=lambda recent: (recent.is_adversarial or not policy_only) and recent.mean(figure) >= limit,
        gone=lambda recent: recent.mean(figure) < RELIEF * limit,
        says=says,
    )


ALARMS = (
    Alarm(
        "saturated",
        (ACCURACY, LOSS, TRUNCATED),
        _is_saturated,
        _no_longer_saturated,
        _saturated_says,
        patience=WINDOW,
    ),
    Alarm(
        "learns nothing",
        (ACCURACY, LENGTH, TEACHER_LENGTH, TRUNCATED),
        _learns_nothing,
        _learns_again,
        _learns_nothing_says,
        patience=LEARNING_STEPS,
    ),
    Alarm(
        "outrun",
        (ACCURACY,),
        holds=lambda recent: recent.mean(ACCURACY) < OUTRUN_ACCURACY,
        gone=lambda recent: recent.mean(ACCURACY) > OUTRUN_ACCURACY / RELIEF,
        says=_outrun_says,
        patience=LEARNING_STEPS,
    ),
    Alarm(
        "length hacking",
        (LENGTH, TEACHER_LENGTH, CORRELATION, MARGIN),
        _is_hacked,
        _no_longer_hacked,
        _hacked_says,
    ),
    _share_alarm("collapsed groups", COLLAPSED, COLLAPSED_GROUPS, _collapsed_says, policy_only=True),
    _share_alarm("truncated", TRUNCATED, MOSTLY_TRUNCATED, _truncated_says),
    _share_alarm("empty", EMPTY, OFTEN_EMPTY, _empty_says),
    Alarm(
        "divergence",
        (KL,),
        holds=lambda recent: recent.typical(KL) >= KL_LIMIT,
        gone=lambda recent: recent.typical(KL) < RELIEF * KL_LIMIT,
        says=_kl_says,
    ),
    Alarm(
        "entropy",
        (ENTROPY,),
        _is_sure_of_itself,
        gone=lambda recent: recent.typical(ENTROPY) > _entropy_limit(recent) / RELIEF,
        says=_entropy_says,
    ),
)
"""All that is watched for."""
