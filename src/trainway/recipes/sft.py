"""Supervised fine-tuning: conversations → tokens and targets → a given model trained on the answers, whole or by LoRA."""

from __future__ import annotations

from typing import Any

from trainway.config.schema import RunConfig
from trainway.recipes.supervised import train_supervised
from trainway.training.evaluate import Prompt, answered_prompts, chat_prompt
from trainway.training.session import RunResult, Session


def sft(config: RunConfig, **how: Any) -> RunResult:
    """Tune `model.path` on conversations, whole or by adapters; see `train_supervised` for the arguments."""
    return train_supervised(config, questions, **how)


def questions(session: Session) -> list[Prompt]:
    """The user's, each as a turn to be answered; without any, those of validation rows with the answers there."""
    config = session.config.eval
    if config.prompts:
        return [chat_prompt(session.tokenizer, text) for text in config.prompts]
    return answered_prompts(session.store.split("val"), session.tokenizer, config.num_samples)
