"""Validation: token-weighted loss, perplexity, bits per byte, and continued prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainway.data.batch import Batch
from trainway.data.store import TokenSplit
from trainway.engines.precision import Precision, autocast
from trainway.engines.world import World
from trainway.losses import IGNORE_INDEX
from trainway.models.attention_choice import plain_attention
from trainway.models.causal_lm import CausalLMLoss


@torch.no_grad()
def evaluate_batches(
    module: nn.Module, batches: Iterable[Batch], token_bytes: np.ndarray, world: World, precision: Precision
) -> dict[str, float]:
    """Evaluate a summed-loss module over this rank's batches and reduce over all ranks.

    Returns:
        val/loss: nats per target token. val/ppl: its exponential. val/bpb: bits per UTF-8 byte of the target
        text, comparable between tokenizers. val/tokens: target tokens.
    """
    lengths = torch.as_tensor(token_bytes, dtype=torch.int64)
    nats, tokens, text_bytes = 0.0, 0, 0
    was_training = module.training
    module.eval()
    world.pulse.enter("validation", long=True)
    for batch in batches:
        world.pulse.tick()
        targets = batch.labels[batch.labels != IGNORE_INDEX]
        tokens += batch.num_targets
        text_bytes += int(lengths[targets].sum())
        batch = batch.to(world.device)
        with autocast(precision, world.device):
            loss = module(batch.input_ids, batch.labels, batch.position_ids, batch.boundaries, batch.targets)
        nats += loss.item()  # device→host sync
    module.train(was_training)
    nats, all_tokens, all_bytes = world.sum(nats, tokens, text_bytes)
    loss_per_token = nats / all_tokens
    return {
        "val/loss": loss_per_token,
        "val/ppl": math.exp(min(loss_per_token, 700.0)),  # exp overflows a double past 709
        "val/bpb": nats / math.log(2) / all_bytes if all_bytes else math.nan,
        "val/tokens": all_tokens,
    }


@torch.no_grad()
def continue_prompts(
    module: CausalLMLoss,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[dict[str, str]]:
    """Yield `{"prompt", "text"}` for each prompt, and its "reference" if it has one; the same seed gives the same text.

    On a sharded model every rank must read all of them, and reads the same.
    """
    model, was_training = module.model, module.training
    module.eval()
    device = model.get_input_embeddings().weight.device
    with (
        _plain_attention(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=device)  # [1, T]
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            room = getattr(model.config, "max_position_embeddings", 2**31) - ids.shape[1]
            output = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(1, min(max_new_tokens, room)),
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
                eos_token_id=_ends(model, tokenizer),
                **sampling,
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            reference = {} if prompt.reference is None else {"reference": prompt.reference}
            yield {"prompt": prompt.text, "text": text, **reference}
    module.train(was_training)


@dataclass(frozen=True)
class Prompt:
    """What a sample continues."""

    text: str
    """As a person reads it."""
    ids: tuple[int, ...]
    reference: str | None = None
    """What the data says there."""


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """A prompt as a document starts: the start token, if the tokenizer has one, then the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return Prompt(text, tuple(start + ids or [tokenizer.eos_token_id]))


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """A prompt as a user's turn, to be answered; without a chat template, as `text_prompt`."""
    if not tokenizer.chat_template:
        return text_prompt(tokenizer, text)
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return Prompt(text, tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))


def answered_prompts(split: TokenSplit, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """Of up to `count` conversations, spread over a prepared split: all before the last answer, and that answer."""
    starts = [int(start) for start in split.document_starts(0, split.num_tokens)]
    rows = list(zip(starts, [*starts[1:], split.num_tokens], strict=True))
    shares = (rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count))
    found = (next(_answered(split, tokenizer, share), None) for share in shares)
    return [prompt for prompt in found if prompt is not None]


def _answered(
    split: TokenSplit, tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[int, int]]
) -> Iterator[Prompt]:
    for start, end in rows:
        tokens, trained = split.tokens(start, end), split.mask(start, end)
        last = int(np.flatnonzero(trained)[-1]) + 1
        untrained = np.flatnonzero(trained[:last] == 0)
        first = int(untrained[-1]) + 1 if len(untrained) else 0
        if first == 0:
            continue  # a text: there is no question
        prompt, answer = tokens[:first].tolist(), tokens[first:last].tolist()
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        yield Prompt(text, tuple(prompt), tokenizer.decode(answer, skip_special_tokens=True))


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens after which there is nothing more to say: the tokenizer's, and those that the model names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = named if isinstance(named, list) else [named]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    # Generation decodes against a cache; packed attention is for whole rows.
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
