"""Pretraining: documents → tokens → a language model trained on every token, checkpointed and evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from trainway.config.schema import RunConfig
from trainway.recipes.supervised import train_supervised
from trainway.training.evaluate import Prompt, text_prompt
from trainway.training.session import RunResult, Session


def pretrain(config: RunConfig, **how: Any) -> RunResult:
    """Train a model from scratch, or `model.path` further, on documents; see `train_supervised` for the arguments."""
    return train_supervised(config, openings, **how)


def openings(session: Session) -> list[Prompt]:
    """The texts of eval.prompts; without any, the beginnings of validation documents."""
    config = session.config.eval
    texts = config.prompts or islice(_openings(session), config.num_samples)
    return [text_prompt(session.tokenizer, text) for text in texts]


def _openings(session: Session, num_tokens: int = 16) -> Iterator[str]:
    """The first tokens of the validation documents, as text."""
    split = session.store.split("val")
    starts = [int(start) for start in split.document_starts(0, split.num_tokens)]
    for start, end in zip(starts, [*starts[1:], split.num_tokens], strict=True):
        tokens = split.tokens(start, min(start + num_tokens, end))
        yield session.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
