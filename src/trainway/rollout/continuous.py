"""Answers by transformers' continuous batching: pages of keys and values, shared by all answers that are being written.

Its calls change between versions of transformers; this module alone knows them. Tokens are drawn as everywhere, by
each answer's own seed: transformers takes the likeliest of scores in which the drawn token is the only one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from trainway.engines.base import Learner
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.attention_choice import plain_attention
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.sampling import draw, uniforms
from trainway.rollout.transformers import answering, check_cache

PREFILL_TOKENS = 1024
"""Tokens, of prompts for the most part, that go through the model at once."""

_KINDS = {"full_attention", "sliding_attention"}
_PAGE_TOKENS = {"cpu": 32, "cuda": 256}
"""Of one answer and one layer, that lie together; what reads whole pages on a GPU wants them large."""


class ContinuousRollout:
    """A rollout engine that holds nothing beside the student but, for the time of a call, its pages.

    Without flash attention every answer is held against the pages of all others, so a large batch is slow; prompts go
    through the model once for each answer, except for whole pages that are there already.
    """

    def __init__(self, learner: Learner, batch_size: int) -> None:
        """`batch_size`: answers that are written at once.

        Raises:
            ConfigError: continuous batching does not know this model's attention.
        """
        check_cache(learner.model)
        _check_attention(learner.model)
        self._learner, self._batch_size = learner, batch_size

    def sync(self) -> None:
        """Nothing to do: the student answers with the weights that it has."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        model = self._learner.model
        with self._learner.whole(), answering(model, _attention(model)):
            if not requests:
                return []
            with _as_here(model), _own_random_state(model.device):
                return _answers(model, requests, sampling, self._batch_size)

    def close(self) -> None:
        """Nothing to do."""


def _check_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds <= _KINDS and getattr(config, "attn_logit_softcapping", None) is None:
        return
    what = ", ".join(sorted(kinds - _KINDS)) or "a cap on its attention scores"
    raise ConfigError(
        f"rollout.batching is continuous, which does not work for {model.config.model_type}",
        f"transformers' continuous batching does not know {what}",
        "set rollout.batching=static",
    )


def _attention(model: PreTrainedModel) -> str:
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    flash = model.device.type == "cuda" and model._supports_flash_attn and not sinks
    return "flash_attention_2" if flash and find_spec("flash_attn") else plain_attention(model)


@contextmanager
def _as_here(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute in this thread's autocast in other threads too."""
    device = model.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    forward, kind = model.forward, torch.get_autocast_dtype(device)

    @functools.wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=kind):
            return forward(*args, **kwargs)

    own = model.__dict__.get("forward")
    model.forward = cast
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    # transformers seeds every generator anew, though nothing here draws from one
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _answers(
    model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, batch_size: int
) -> list[list[Rollout]]:
    seeds = {
        f"{number}/{index}": seed
        for number, request in enumerate(requests)
        for index, seed in enumerate(request.seeds)
    }
    longest = max(len(request.prompt) for request in requests) + sampling.max_new_tokens
    page = _PAGE_TOKENS[model.device.type]
    ends = list(sampling.end_tokens) or -1
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=ends),
        ContinuousBatchingConfig(
            page_size=page,
            num_blocks=batch_size * -(-longest // page),
            max_batch_tokens=max(PREFILL_TOKENS, batch_size),
            max_requests_per_batch=batch_size,
            safety_margin=0.0,  # there are pages for all
            auto_switch_to_flash=False,
            disable_nccl_graph_mixing=False,
        ),
    )
    try:
        manager.logit_processor = _Drawing(seeds, sampling)
        manager.warmup()
        _store_as(manager.batch_processor.cache)
        manager.start()
        for number, request in enumerate(requests):
            prompt = request.prompt.tolist()
            for index in range(len(request.seeds)):
                manager.add_request(prompt, request_id=f"{number}/{index}", eos_token_id=ends)
        answers = _collect(manager, len(seeds))
    finally:
        if manager.is_running():
            manager.stop(hard_stop=True)
        manager.destroy()
    return [
        [_rollout(answers[f"{number}/{index}"], sampling) for index in range(len(request.seeds))]
        for number, request in enumerate(requests)
    ]


def _store_as(cache: Any) -> None:
    """Let pages take keys and values of another type than their own, as autocast makes them."""
    update = cache.update

    def cast(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(key_states.to(cache.dtype), value_states.to(cache.dtype), *args, **kwargs)

    cache.update = cast


def _collect(manager: Any, count: int) -> dict[str, list[int]]:
    """The tokens of `count` answers, by their names; one that fails is an error here and a log line in transformers."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1.0)
        if result is not None and result.error is not None:
            raise _failed(result.error)
        if result is not None and result.is_finished():
            found[result.request_id] = result.generated_tokens
        elif result is None and not manager.is_running():
            raise _failed(f"{len(found)} of {count} answers came")
    return found


def _failed(why: str) -> EnvironmentFault:
    return EnvironmentFault(
        "transformers' continuous batching has failed",
        why,
        "lower rollout.batch_size if memory was short, or set rollout.batching=static",
    )


def _rollout(tokens: list[int], sampling: Sampling) -> Rollout:
    return Rollout(np.array(tokens, np.int32), truncated=tokens[-1] not in sampling.end_tokens)


class _Drawing(ContinuousBatchingLogitsProcessorList):
    """Scores of 1 for the tokens that the seeds of the answers draw, and 0 for all others.

    The random numbers travel as the arguments that transformers keeps for every answer: a double in two int32.
    """

    def __init__(self, seeds: Mapping[str, int], sampling: Sampling) -> None:
        super().__init__(LogitsProcessorList())
        self._seeds, self._sampling = seeds, sampling
        self.tensors_required = 2
        self.do_processing = True

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        seeds = np.array([self._seeds[state.request_id] for state in states], np.uint64)
        # tokens that have gone through the model, the prompt's apart; one begun anew has some of its own among those
        drawn = [
            state.position_offset - (state._true_initial_tokens or len(state.initial_tokens))
            for state in states
        ]
        words = uniforms(seeds, np.array(drawn)).view(np.int32).reshape(-1, 2)
        arg_storage[:2, : len(states)] = torch.from_numpy(words.T.copy()).to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        uniform = logits_processor_args[:2].T.contiguous().view(torch.float64)[:, 0]
        tokens = draw(scores, uniform, self._sampling.temperature, self._sampling.top_p)
        return torch.zeros_like(scores).scatter_(1, tokens[:, None], 1.0)
