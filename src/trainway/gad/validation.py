"""Validation: the student answers held-out prompts greedily, beside the teacher and before the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from trainway.data.teacher_rows import TeacherRow
from trainway.gad.measures import Answer, answer_measures
from trainway.gad.phases import (
    Players,
    all_exchanges,
    cross_entropy,
    score,
    teacher_exchanges,
    write_answers,
)
from trainway.gad.samples import Sample
from trainway.rollout.base import Sampling


def validate(
    players: Players,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TeacherRow],
    sampling: Sampling,
    step: int,
    num_samples: int,
) -> tuple[dict[str, float], list[Sample]]:
    """The figures of `answer_measures` and val/loss, nats per token of the teacher's answers; and some samples.

    All ranks call it together and get the same. `sampling`: that of training; here the likeliest token is taken.
    """
    players.world.pulse.enter("validation", long=True)
    written = write_answers(players, rows, [(0,)] * len(rows), replace(sampling, temperature=0.0))
    scores: torch.Tensor | None = None
    if players.discriminator is not None:
        answered = all_exchanges(rows, written)
        scores = score(players, players.batches(answered), len(answered))
    nats, tokens = cross_entropy(players, teacher_exchanges(rows))
    answers = [
        Answer(
            tokens=answer.tokens,
            text=_text(tokenizer, answer.tokens.tolist()),
            truncated=answer.truncated,
            teacher_length=len(row.response),
            teacher_text=_text(tokenizer, row.response.tolist()),
            score=None if scores is None else scores[index].item(),
            teacher_score=None if scores is None else scores[len(rows) + index].item(),
        )
        for index, (row, (answer,)) in enumerate(zip(rows, written, strict=True))
    ]
    world = players.world
    own = answers[world.rank :: world.world_size]
    found = answer_measures(own, [answer.tokens for answer in answers], world.sum)
    samples = [
        Sample(
            step=step,
            prompt=_text(tokenizer, row.prompt.tolist()),
            teacher=answer.teacher_text,
            student=answer.text,
            score=answer.score,
            teacher_score=answer.teacher_score,
            truncated=answer.truncated,
        )
        for row, answer in zip(rows[:num_samples], answers, strict=False)
    ]
    return {"val/loss": nats / tokens, **found}, samples


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
