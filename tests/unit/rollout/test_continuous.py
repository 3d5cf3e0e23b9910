"""Continuous batching gives the answers that the static batch gives, greedy and drawn."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.base_models import tiny_model
from tests.lora_models import adapted, plain, stir
from tests.unit.rollout.test_transformers import GREEDY, generated, learner, prompts, sampled_requests
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.attention import PACKED_ATTENTION, use_packed_attention
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.continuous import ContinuousRollout
from trainway.rollout.transformers import TransformersRollout


def tokens(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.tokens.tolist() for rollout in group] for group in groups]


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3_moe", "gemma3_text")),
    ],
)
def test_static_continuous_and_generate_answer_alike(family: str) -> None:
    """Also after a change of weights."""
    model = tiny_model(family)
    engines = [TransformersRollout(learner(model), 4), ContinuousRollout(learner(model), 4)]
    requests = [Request(prompt, (1, 2)) for prompt in prompts()]
    found = []
    for _ in range(2):
        expected = [[generated(model, prompt, GREEDY)] * 2 for prompt in prompts()]
        for engine in engines:
            engine.sync()
            assert tokens(engine.generate(requests, GREEDY)) == expected
        found.append(expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(
                    1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    assert found[0] != found[1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_drawn_answers_are_those_of_the_static_batch(top_p: float) -> None:
    model, sampling = tiny_model("llama"), Sampling(30, 0.9, top_p, (2, 7, 30))
    requests = sampled_requests()
    expected = TransformersRollout(learner(model), 64).generate(requests, sampling)
    for batch_size in (4, 64) if top_p == 1 else (5,):
        found = ContinuousRollout(learner(model), batch_size).generate(requests, sampling)
        assert tokens(found) == tokens(expected)
        for group, other in zip(found, expected, strict=True):
            assert [r.truncated for r in group] == [r.truncated for r in other]
            assert all(r.tokens.dtype == np.int32 for r in group)


def test_adapters_and_bf16_answer_too() -> None:
    model = adapted(plain("llama"), "llama", LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.5))
    stir(model)
    requests = [Request(prompt, (1,)) for prompt in prompts()]
    for precision, batch_size in (("fp32", 4), ("bf16", 1)):
        expected = TransformersRollout(learner(model, precision), batch_size).generate(requests, GREEDY)
        found = ContinuousRollout(learner(model, precision), batch_size).generate(requests, GREEDY)
        same = [a == b for a, b in zip(tokens(found), tokens(expected), strict=True)]
        assert all(same) if precision == "fp32" else sum(same) > len(same) // 2  # bf16 rounds pages otherwise


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    use_packed_attention(model)
    model.train()
    forward, state = model.forward, torch.get_rng_state()
    ContinuousRollout(learner(model, "bf16"), 4).generate(sampled_requests(), Sampling(5, 1.0, 1.0, (2,)))
    assert model.training and model.config._attn_implementation == PACKED_ATTENTION
    assert model.forward == forward
    assert torch.equal(torch.get_rng_state(), state)


def test_no_requests() -> None:
    assert ContinuousRollout(learner(tiny_model("llama")), 4).generate([], GREEDY) == []


def test_a_failure_is_no_missing_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers itself writes a line into a log and returns the other answers."""
    caplog.set_level(logging.CRITICAL)
    model = tiny_model("llama")
    calls = 0

    def fail(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("out of memory")
        return forward(self, *args)

    attention = type(model.model.layers[1].mlp)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", fail)
    with pytest.raises(EnvironmentFault, match="out of memory"):
        ContinuousRollout(learner(model), 4).generate(sampled_requests(), GREEDY)


@pytest.mark.parametrize(("family", "why"), [("gemma2", "a cap on its attention scores")])
def test_attention_that_it_does_not_know_is_refused(family: str, why: str) -> None:
    model: PreTrainedModel = tiny_model(family)
    with pytest.raises(ConfigError, match=why):
        ContinuousRollout(learner(model), 4)
