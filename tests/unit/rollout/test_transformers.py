"""Answers of the student's own model are those of transformers' `generate`, whatever they share a batch with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.base_models import tiny_model
from tests.lora_models import EXPERTS, adapted, plain, stir
from trainway.config.schema import LoraConfig, OptimConfig
from trainway.engines.precision import Precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World
from trainway.errors import ConfigError
from trainway.models.attention import PACKED_ATTENTION, use_packed_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.cache import ColumnCache, StateCache, new_cache
from trainway.rollout.transformers import TransformersRollout

OFTEN = ("llama", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss")
FAMILIES = [
    *OFTEN,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("qwen3", "mistral", "deepseek_v3", "gpt2", "phi3")
    ),
]
LENGTHS = (1, 3, 9, 9, 21, 30)
GREEDY = Sampling(24, 0.0, 1.0, (2,))


def learner(model: PreTrainedModel, precision: Precision = "fp32") -> SingleLearner:
    world = World(0, 0, 1, 1, torch.device("cpu"))
    return SingleLearner(CausalLMLoss(model), model, OptimConfig(), world, precision)


def prompts(lengths: Sequence[int] = LENGTHS, vocabulary: int = 64) -> list[np.ndarray]:
    generator = np.random.default_rng(4)
    return [generator.integers(3, vocabulary, length).astype(np.int32) for length in lengths]


def answers(
    model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, batch_size: int = 4
) -> list[list[list[int]]]:
    found = TransformersRollout(learner(model), batch_size).generate(requests, sampling)
    return [[rollout.tokens.tolist() for rollout in group] for group in found]


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: np.ndarray, sampling: Sampling) -> list[int]:
    """What transformers' own greedy decoding answers, to one prompt alone."""
    ids = torch.from_numpy(prompt).long()[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.end_tokens),
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def varied(family: str) -> PreTrainedModel:
    """A tiny model whose biases are around 0, or they alone would say which token comes."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1:
                parameter.sub_(1.0)
    return model


def greedy_ends(model: PreTrainedModel) -> Sampling:
    """Greedy, with end tokens that let answers end at different lengths."""
    free = [generated(model, prompt, GREEDY) for prompt in prompts()]

    def lengths(ends: set[int]) -> set[int]:
        return {next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) for tokens in free}

    ends: set[int] = set()
    for token in sorted({token for tokens in free for token in tokens} - {tokens[0] for tokens in free}):
        if len(lengths(ends | {token})) > len(lengths(ends)):
            ends.add(token)
    return Sampling(24, 0.0, 1.0, tuple(sorted(ends)))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str) -> None:
    """Windows are shorter than prompts, prompts of other lengths share a batch, and answers leave it early."""
    model = varied(family)
    sampling = greedy_ends(model)
    expected = [[generated(model, prompt, sampling)] * 2 for prompt in prompts()]
    assert len({len(group[0]) for group in expected}) > 2
    requests = [Request(prompt, (1, 2)) for prompt in prompts()]
    assert isinstance(new_cache(model.config), ColumnCache)
    for batch_size in (3, 64):
        assert answers(model, requests, sampling, batch_size) == expected


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.5)),
        ("llama", LoraConfig(enabled=True, r=4, alpha=8.0, use_dora=True)),
        ("qwen3-moe", LoraConfig(enabled=True, r=4, alpha=8.0, target_parameters=EXPERTS)),
    ],
)
def test_adapters_answer_too(family: str, lora: LoraConfig) -> None:
    model = adapted(plain(family), family, lora)
    stir(model)
    expected = [[generated(model, prompt, GREEDY)] for prompt in prompts()]
    assert expected != [[generated(plain(family), prompt, GREEDY)] for prompt in prompts()]
    model.train()
    assert answers(model, [Request(prompt, (1,)) for prompt in prompts()], GREEDY) == expected


def hybrid() -> PreTrainedModel:
    """A model that keeps the last inputs of convolutions beside keys and values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2", vocab_size=80, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, layer_types=["conv", "full_attention", "conv"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_model_with_other_states_answers_too() -> None:
    model = hybrid()
    assert isinstance(new_cache(model.config), StateCache)
    sampling = greedy_ends(model)
    expected = [[generated(model, prompt, sampling)] * 2 for prompt in prompts()]
    requests = [Request(prompt, (1, 2)) for prompt in prompts()]
    for batch_size in (3, 64):
        assert answers(model, requests, sampling, batch_size) == expected


def sampled_requests() -> list[Request]:
    return [Request(prompt, (10 * i + 1, 10 * i + 2, 10 * i + 3)) for i, prompt in enumerate(prompts())]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_an_answer_depends_on_its_seed_alone(family: str) -> None:
    """Not on the other requests, their order, or the size of the batch."""
    model, requests = varied(family), sampled_requests()
    sampling = Sampling(24, 0.9, 0.95, (2, 7, 30))
    expected = answers(model, requests, sampling, 64)
    lengths = [len(tokens) for group in expected for tokens in group]
    assert len(set(lengths)) > 5 and max(lengths) == 24
    assert all(len({tuple(tokens) for tokens in group}) > 1 for group in expected)
    assert answers(model, requests, sampling, 64) == expected
    assert answers(model, requests, sampling, 5) == expected
    assert answers(model, requests[::-1], sampling, 64) == expected[::-1]
    halves = answers(model, requests[:2], sampling) + answers(model, requests[2:], sampling)
    assert halves == expected
    swapped = [Request(request.prompt, request.seeds[::-1]) for request in requests]
    assert answers(model, swapped, sampling) == [group[::-1] for group in expected]
    assert answers(model, requests[3:4], sampling, 1) == expected[3:4]


def test_first_tokens_follow_the_softmax() -> None:
    model, (prompt,) = tiny_model("llama"), prompts([7])
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt).long()[None]).logits[0, -1].double()
    count = 20_000
    for temperature, top_p in ((0.8, 1.0), (1.7, 0.9)):
        shares = (logits / temperature).softmax(-1)
        order = shares.argsort(descending=True)
        inside = shares[order].cumsum(0) - shares[order] < top_p
        kept = torch.zeros_like(shares).index_fill_(0, order[inside], 1.0) * shares
        expected = count * kept / kept.sum()
        request = Request(prompt, tuple(range(count)))
        groups = answers(model, [request], Sampling(1, temperature, top_p, (2,)), count)
        counts = torch.bincount(torch.tensor(groups[0])[:, 0], minlength=80)
        assert counts[expected == 0].sum() == 0
        seen = expected > 5
        freedom = int(seen.sum()) - 1
        assert freedom > 15
        chi_square = float(((counts - expected) ** 2 / expected)[seen].sum())
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_no_position_is_beyond_the_longest_answer() -> None:
    """A row that has ended stays in the batch for some steps, and learned positions end with the longest answer."""
    model, sampling = tiny_model("gpt2", n_positions=54), Sampling(24, 1.5, 1.0, tuple(range(2, 10)))
    long, short = prompts([30, 9])

    def seeds(prompt: np.ndarray, length: range, count: int) -> list[int]:
        groups = answers(model, [Request(prompt, tuple(range(400)))], sampling, 400)
        return [seed for seed, tokens in enumerate(groups[0]) if len(tokens) in length][:count]

    chosen = seeds(short, range(5, 9), 7) + seeds(short, range(24, 25), 7)
    requests = [Request(long, tuple(seeds(long, range(24, 25), 1)))]
    requests += [Request(short, (seed,)) for seed in chosen]
    lengths = [len(group[0]) for group in answers(model, requests, sampling, 8)]
    assert lengths[0] == 24 and max(lengths[1:8]) < 9 and lengths[8:] == [24] * 7


def test_what_comes_back() -> None:
    model = tiny_model("llama")
    (prompt,) = prompts([9])
    free = generated(model, prompt, Sampling(6, 0.0, 1.0, ()))
    stop = 2
    end = free[stop]
    assert end not in free[:stop]
    engine = TransformersRollout(learner(model), 2)
    (group, none) = engine.generate(
        [Request(prompt, (1, 2, 3)), Request(prompt, ())], Sampling(6, 0.0, 1.0, (end,))
    )
    assert none == [] and len(group) == 3
    assert [rollout.tokens.tolist() for rollout in group] == [free[: stop + 1]] * 3
    assert all(rollout.tokens.dtype == np.int32 and not rollout.truncated for rollout in group)
    (cut,) = engine.generate([Request(prompt, (1,))], Sampling(stop, 0.0, 1.0, (end,)))[0]
    assert isinstance(cut, Rollout) and cut.truncated and cut.tokens.tolist() == free[:stop]
    assert engine.generate([], GREEDY) == []


def test_new_weights_answer_at_once() -> None:
    model = tiny_model("llama")
    engine = TransformersRollout(learner(model), 4)
    requests = [Request(prompt, (1,)) for prompt in prompts()]
    before = engine.generate(requests, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.sync()
    after = [group[0].tokens.tolist() for group in engine.generate(requests, GREEDY)]
    assert after == [generated(model, prompt, GREEDY) for prompt in prompts()]
    assert after != [group[0].tokens.tolist() for group in before]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.0)
    use_packed_attention(model)
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    answers(model, sampled_requests(), Sampling(5, 1.0, 1.0, (2,)))
    assert model.training and all(module.training for module in model.modules())
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16_answers_are_those_of_training_in_bf16() -> None:
    """One prompt at a time: the same matrix products, and keys that are held in bf16 instead of cast in every step."""
    model = tiny_model("llama")
    found = [
        TransformersRollout(learner(model, "bf16"), 4).generate([Request(prompt, (1,))], GREEDY)[0][0]
        for prompt in prompts()
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [generated(model, prompt, GREEDY) for prompt in prompts()]
    assert [rollout.tokens.tolist() for rollout in found] == expected


@pytest.mark.slow
def test_a_compiled_block_answers_uncompiled() -> None:
    model = tiny_model("llama")
    expected = answers(model, sampled_requests(), GREEDY)

    def refuse(*args: object) -> None:
        raise AssertionError("compiled")

    for block in model.model.layers:
        block.compile(backend=refuse)
    assert answers(model, sampled_requests(), GREEDY) == expected


def test_a_model_without_a_cache_is_refused() -> None:
    model = tiny_model("llama")
    model.forward = lambda input_ids: None
    with pytest.raises(ConfigError, match="takes no past_key_values"):
        TransformersRollout(learner(model), 4)
