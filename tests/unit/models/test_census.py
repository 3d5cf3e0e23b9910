"""Counts of published models, built without weights from what their config.json says, and the FLOPs of a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.base_models import tiny_model
from trainway.config.schema import ModelConfig
from trainway.models.base import meta_model
from trainway.models.census import Census, flops_per_token, model_census
from trainway.planning import arithmetic

GPT_OSS_20B: dict[str, Any] = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "sliding_window": 128,
}  # fmt: skip
LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False, "use_sliding_window": False,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {}  # transformers' defaults are this model
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def census(family: str, settings: dict[str, Any]) -> tuple[Census, Any]:
    config = AutoConfig.for_model(family, **settings)
    return model_census(meta_model(config, torch.bfloat16)), config


@pytest.mark.parametrize(
    ("family", "settings", "total", "active", "matmul"),
    [
        # gpt-oss's own "3.6B active" leaves the input embedding out, Qwen's "3.3B" does not
        ("gpt_oss", GPT_OSS_20B, 20.91e9, 4.19e9, 3.61e9),
        ("llama", LLAMA3_8B, 8.03e9, 8.03e9, 7.50e9),
        ("qwen3_moe", QWEN3_30B, 30.53e9, 3.35e9, 3.04e9),
        ("deepseek_v3", DEEPSEEK_V3, 671.0e9, 37.5e9, 36.6e9),
        ("llama", SMOLLM2, 134.5e6, 134.5e6, 134.5e6),
    ],
    ids=["gpt-oss-20b", "Llama-3-8B", "Qwen3-30B-A3B", "DeepSeek-V3", "SmolLM2-135M"],
)
def test_published_sizes(
    family: str, settings: dict[str, Any], total: float, active: float, matmul: float
) -> None:
    counts, _ = census(family, settings)
    assert counts.total == pytest.approx(total, rel=2e-3)
    assert counts.active == pytest.approx(active, rel=2e-3)
    assert counts.matmul == pytest.approx(matmul, rel=2e-3)
    assert counts.trainable == counts.total and counts.matmul_trainable == counts.matmul


def test_gpt_oss_20b_to_the_last_weight() -> None:
    counts, _ = census("gpt_oss", GPT_OSS_20B)
    hidden, heads, kv = 2880, 64 * 64, 8 * 64
    attention = 2 * hidden * heads + heads + hidden + 2 * (hidden * kv + kv) + 64  # with biases and sinks
    router = 32 * hidden + 32
    expert = 3 * hidden * hidden + 3 * hidden
    outside = 2 * 201088 * hidden + hidden
    assert counts.total == 24 * (attention + router + 32 * expert + 2 * hidden) + outside
    assert counts.active == 24 * (attention + router + 4 * expert + 2 * hidden) + outside
    matrices = 2 * hidden * heads + 2 * hidden * kv + 32 * hidden + 4 * 3 * hidden * hidden
    assert counts.matmul == 24 * matrices + 201088 * hidden


@pytest.mark.parametrize("causal", [False, True])
def test_flops_agree_with_the_arithmetic_of_new_models(causal: bool) -> None:
    new = ModelConfig(hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536)
    counts, config = census("llama", SMOLLM2)
    expected = arithmetic.flops_per_token(new, 49152, 1000, causal=causal)
    assert flops_per_token(counts, config, 1000, causal=causal) == pytest.approx(expected, rel=1e-12)


def test_flops_of_windows_and_of_latent_attention() -> None:
    counts, config = census("gpt_oss", GPT_OSS_20B)
    attention = flops_per_token(counts, config, 2048) - 6 * counts.matmul
    assert attention == 12 * 64 * 64 * (12 * 128 + 12 * 2048)
    causal = flops_per_token(counts, config, 4, causal=True) - 6 * counts.matmul
    assert causal == 12 * 64 * 64 * 24 * (1 + 2 + 3 + 4) / 4
    longer = flops_per_token(counts, config, 130, causal=True) - 6 * counts.matmul
    window = (128 * 129 / 2 + 2 * 128) / 130  # the last two queries meet no more than 128 keys
    assert longer == pytest.approx(12 * 64 * 64 * (12 * window + 12 * 131 / 2), rel=1e-12)
    counts, config = census("deepseek_v3", DEEPSEEK_V3)
    attention = flops_per_token(counts, config, 1000) - 6 * counts.matmul
    assert attention == pytest.approx(6 * 61 * 128 * (192 + 128) * 1000, rel=1e-9)


def test_frozen_weights_cost_two_thirds() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    all_learn = model_census(model)
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    one_learns = model_census(model)
    assert (one_learns.trainable, one_learns.matmul_trainable) == (32 * 40, 32 * 40)
    assert one_learns.matmul == all_learn.matmul
    saved = flops_per_token(all_learn, model.config, 64) - flops_per_token(one_learns, model.config, 64)
    assert saved == 2 * (all_learn.matmul - 32 * 40)


def test_embeddings_of_positions_multiply_nothing() -> None:
    model = tiny_model("gpt2")
    blocks = 3 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32)
    assert model_census(model).matmul == blocks + 80 * 32  # the tied head
