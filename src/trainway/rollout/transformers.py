"""Answers by the student's own model, in the training's own processes: decoded in a batch that answers join and leave.

Which numbers an answer is drawn with depends on its seed alone. The probabilities that they are held against do not
quite: a matrix product over 64 rows may round its sums otherwise than one over 8, so another batch, another number of
ranks or another device can move a logit in its last digits, and with it now and then a token. In fp32 about one answer
of a hundred parts from there on; in bf16, whose last digit is the third, most long ones do. The same requests in the
same order on the same hardware always get the same answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from trainway.engines.base import Learner
from trainway.errors import ConfigError
from trainway.models.attention_choice import plain_attention
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.cache import ColumnCache, Joining, new_cache
from trainway.rollout.sampling import draw, uniforms

PREFILL_TOKENS = 16384
"""Tokens of prompts, padding included, that go through the model at once; a longer prompt goes alone."""
_JOINING, _LEAVING = 8, 4
"""Rows change when this part of a batch is free for waiting prompts, or of the rows has ended: each change copies the
cache."""


class TransformersRollout:
    """A rollout engine that holds nothing beside the student: its weights are gathered where they are sharded, once for
    all requests, and each rank answers its own.

    A prompt goes through the model once for all of its answers. As answers end, waiting prompts take their place, the
    longest first.
    """

    def __init__(self, learner: Learner, batch_size: int) -> None:
        """`batch_size`: answers that are written at once.

        Raises:
            ConfigError: the model cannot go on from what it has computed before.
        """
        check_cache(learner.model)
        self._learner, self._batch_size = learner, batch_size

    def sync(self) -> None:
        """Nothing to do: the student answers with the weights that it has."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        model = self._learner.model
        with self._learner.whole(), answering(model, plain_attention(model)):
            return _Batch(model, requests, sampling, self._batch_size).answers()

    def close(self) -> None:
        """Nothing to do."""


def check_cache(model: PreTrainedModel) -> None:
    """Raises ConfigError for a model without transformers' cache of keys and values."""
    if "past_key_values" not in signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} cannot answer in the training's own processes",
            "its forward takes no past_key_values, the cache that answers are decoded against",
            "set rollout.engine=vllm",
        )


@contextmanager
def answering(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """The model as it answers: no gradients, no dropout, not compiled, transformers' own `attention`; then as before."""
    before, was_training = model.config._attn_implementation, model.training
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    model.eval()
    model.set_attn_implementation(attention)  # packed attention is for whole rows
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


@dataclass(eq=False)
class _Answer:
    seed: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def cached(self) -> int:
        """Tokens that the cache holds: the newest one has yet to go through the model."""
        return self.prompt_tokens + len(self.tokens) - 1


class _Prompt(NamedTuple):
    """A request, or some answers of one that has more than fit into a batch."""

    tokens: np.ndarray
    answers: list[_Answer]


class _Batch:
    """The answers of one call of `generate`, and the rows in which some of them are being written."""

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, batch_size: int
    ) -> None:
        self._model, self._sampling, self._batch_size = model, sampling, batch_size
        self._ends = frozenset(sampling.end_tokens)
        self._device = model.get_input_embeddings().weight.device
        self._known = signature(model.forward).parameters
        self._cache = new_cache(model.config)
        # the last position of an answer that goes through the model; rows that have ended are not to go beyond
        self._last = (
            max((len(request.prompt) for request in requests), default=0) + sampling.max_new_tokens - 2
        )
        self._answers = [
            [_Answer(seed, len(request.prompt)) for seed in request.seeds] for request in requests
        ]
        prompts = [
            _Prompt(request.prompt, answers[start : start + batch_size])
            for request, answers in zip(requests, self._answers, strict=True)
            for start in range(0, len(answers), batch_size)
        ]
        # longest first: what goes through the model together is of about one length, and the most memory is used early
        self._waiting = deque(sorted(prompts, key=lambda prompt: -len(prompt.tokens)))
        self._rows: list[_Answer] = []  # what has ended stays until rows change
        self._length = 0  # columns of the cache
        self._starts = self._newest = self._tensor([])  # [R] each row's first column; its newest token

    def answers(self) -> list[list[Rollout]]:
        while self._waiting or self._rows:
            joining = self._next_prompts()
            ended = sum(answer.ended for answer in self._rows)
            if joining or (ended and ended * _LEAVING >= len(self._rows)):
                self._change_rows(joining)
            if self._rows:
                self._step()
        return [
            [Rollout(np.array(a.tokens, np.int32), truncated=a.tokens[-1] not in self._ends) for a in answers]
            for answers in self._answers
        ]

    def _next_prompts(self) -> list[_Prompt]:
        """Waiting prompts that fit beside the answers not yet ended; none while there is little room."""
        writing = sum(not answer.ended for answer in self._rows)
        free, found = self._batch_size - writing, list[_Prompt]()
        joins = isinstance(self._cache, ColumnCache)
        if writing and (not joins or free * _JOINING < self._batch_size):
            return found
        while self._waiting and len(self._waiting[0].answers) <= free:
            if found and not joins and not _go_together([*found, self._waiting[0]]):
                break
            found.append(self._waiting.popleft())
            free -= len(found[-1].answers)
        return found

    def _change_rows(self, joining: list[_Prompt]) -> None:
        """Let go of rows that have ended, and put prompts through the model whose answers begin."""
        kept = [row for row, answer in enumerate(self._rows) if not answer.ended]
        rows, joined = [self._rows[row] for row in kept], list[Joining]()
        for prompts in _portions(joining):
            cache, logits = self._prefill(prompts)
            answers = [(answer, i) for i, prompt in enumerate(prompts) for answer in prompt.answers]
            self._draw([answer for answer, _ in answers], logits[self._tensor([i for _, i in answers])])
            begun = [(answer, i) for answer, i in answers if not answer.ended]
            if begun:
                rows += [answer for answer, _ in begun]
                joined.append((cache, self._tensor([i for _, i in begun])))
        self._rows = rows
        if not rows:
            return
        self._length = max(answer.cached for answer in rows)
        self._cache.change(self._tensor(kept) if kept else None, joined, self._length)
        self._starts = self._tensor([self._length - answer.cached for answer in rows])
        self._newest = self._tensor([answer.tokens[-1] for answer in rows])
        self._padded = any(answer.cached < self._length for answer in rows)

    def _prefill(self, prompts: list[_Prompt]) -> tuple[Cache, Tensor]:
        """The cache of some prompts, padded on their left, and the logits [N, V] of their first tokens."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        ids = np.zeros((len(prompts), max(lengths)), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[len(row) - len(prompt.tokens) :] = prompt.tokens
        starts = max(lengths) - self._tensor(lengths)[:, None]  # [N, 1]
        columns = torch.arange(max(lengths), device=self._device)
        mask = columns >= starts if min(lengths) < max(lengths) else None
        cache = DynamicCache(config=self._model.config)
        positions = (columns - starts).clamp_(min=0)
        return cache, self._logits(torch.from_numpy(ids).to(self._device), positions, mask, cache)

    def _step(self) -> None:
        """One token more for every row."""
        length, starts = self._length, self._starts[:, None]
        mask = torch.arange(length + 1, device=self._device) >= starts if self._padded else None
        positions = (length - starts).clamp_(max=self._last)
        logits = self._logits(self._newest[:, None], positions, mask, self._cache)
        self._length += 1
        self._newest = self._draw(self._rows, logits)

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Those [R, V] of what follows ids [R, T]; mask [R, columns of the cache + T], none where nothing is padded."""
        inputs: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in self._known}
        inputs |= {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        logits: Tensor = self._model(input_ids=ids, **inputs).logits[:, -1]
        return logits

    def _draw(self, answers: Sequence[_Answer], logits: Tensor) -> Tensor:
        """Draw a token [R] for each answer, and add it to those that have not ended."""
        sampling = self._sampling
        seeds = np.array([answer.seed for answer in answers], np.uint64)
        uniform = uniforms(seeds, np.array([len(answer.tokens) for answer in answers]))
        drawn = draw(logits, torch.from_numpy(uniform).to(self._device), sampling.temperature, sampling.top_p)
        for answer, token in zip(answers, drawn.tolist(), strict=True):  # device→host sync
            if not answer.ended:
                answer.tokens.append(token)
                answer.ended = token in self._ends or len(answer.tokens) == sampling.max_new_tokens
        return drawn

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _go_together(prompts: list[_Prompt]) -> bool:
    """Whether prompts, the longest first, need no padding and no second pass through the model."""
    length = len(prompts[0].tokens)
    return len(prompts[-1].tokens) == length and len(prompts) * length <= PREFILL_TOKENS


def _portions(prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
    """Prompts, the longest first, in groups that go through the model together."""
    while prompts:
        count = max(1, PREFILL_TOKENS // len(prompts[0].tokens))
        yield prompts[:count]
        prompts = prompts[count:]
