"""Counts against the model itself; FLOPs against hand counts."""

import pytest
import torch

from trainway.config.schema import LoraConfig, ModelConfig
from trainway.models.load import build_model
from trainway.planning.arithmetic import (
    count_parameters,
    flops_per_token,
    padded_vocab_size,
    peak_flops,
)
from trainway.planning.published import published_shape
from trainway.planning.shapes import ModelShape

SHAPES = [
    ModelConfig(),
    ModelConfig(tie_embeddings=False, num_kv_heads=2),
    ModelConfig(architecture="qwen3", num_kv_heads=1, head_dim=32),
    ModelConfig(architecture="qwen3", tie_embeddings=False),
]


@pytest.mark.parametrize("config", SHAPES)
def test_counts_equal_the_model(config):
    model = build_model(config, 1024, seed=0, device="meta")
    counts = count_parameters(config, 1024)
    assert counts.total == sum(p.numel() for p in model.parameters()) == counts.trainable
    assert counts.embedding == model.get_input_embeddings().weight.numel()
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert counts.matmul == sum(w.numel() for w in linear)


def test_flops_per_token():
    config = ModelConfig(hidden_size=384, num_layers=8, num_heads=6, intermediate_size=1024)
    matmul = 8 * (4 * 384**2 + 3 * 384 * 1024) + 16384 * 384
    assert flops_per_token(config, 16384, 512) == 6 * matmul + 12 * 8 * 384 * 512
    assert flops_per_token(config, 16384, 512, causal=True) == 6 * matmul + 12 * 8 * 384 * 256.5


def test_peaks_and_padding():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("AMD EPYC") is None
    assert [padded_vocab_size(n) for n in (1, 64, 65, 32000)] == [64, 64, 128, 32000]


GPT_OSS = "openai/gpt-oss-20b"


def published(name: str) -> ModelShape:
    shape = published_shape(name)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("openai/gpt-oss-20b", 20_914_757_184, 4_187_440_704),
        ("openai/gpt-oss-120b", 116_829_156_672, 5_711_982_912),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, 3_085_938_688),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 134_515_008),
    ],
)
def test_published_models_have_their_published_sizes(name, total, active):
    counts = count_parameters(published(name))
    assert counts.total == counts.trainable == total
    assert counts.active == active


def test_flops_of_a_mixture_and_of_its_windows():
    shape = published(GPT_OSS)
    counts = count_parameters(shape)
    experts = 24 * 32 * (2880 * 5760 + 2880 * 2880)
    attention = 24 * 2 * 2880 * (4096 + 512)
    assert counts.matmul == experts * 4 // 32 + attention + 201088 * 2880
    biases = 24 * 32 * (5760 + 2880)
    assert counts.active == counts.total - (experts + biases) * 28 // 32
    # published as 3.61B, which leaves the input embedding out
    assert round((counts.active - counts.embedding) / 1e9, 2) == 3.61
    # every other layer looks back 128 tokens
    assert flops_per_token(shape, context=2048) == 6 * counts.matmul + 12 * 12 * 4096 * (2048 + 128)
    assert flops_per_token(shape, context=64) == 6 * counts.matmul + 12 * 24 * 4096 * 64


def test_frozen_weights_have_no_gradient_of_their_own():
    shape = published("Qwen/Qwen2.5-3B-Instruct")
    lora = LoraConfig(enabled=True, r=16)
    adapters = 36 * 16 * (2 * 4096 + 2 * 2304)
    attention = 12 * 36 * 2048 * 512
    assert count_parameters(shape, lora=lora).trainable == adapters
    assert flops_per_token(shape, context=512, lora=lora) == (
        4 * count_parameters(shape).matmul + 6 * adapters + attention
    )
    off = LoraConfig(r=16)
    assert flops_per_token(shape, context=512, lora=off) == flops_per_token(shape, context=512)
    assert count_parameters(shape, lora=off).trainable == 3_085_938_688
