"""Adapters counted without the model are those that peft puts into it."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest

from tests.unit.planning.test_shapes import EXPERTS, config_and_model
from trainway.config.schema import LoraConfig
from trainway.models.lora import find_targets
from trainway.planning.adapters import count_adapters
from trainway.planning.published import published_shape
from trainway.planning.shapes import read_shape

GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 2}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"r": 4}),
    ("llama", {}, {"r": 4, "use_dora": True, "target_modules": ("all-linear",)}),
    ("llama", {}, {"r": 4, "rank_pattern": {"1.self_attn.q_proj": 9, "v_.*": 2}}),
    ("llama", {}, {"r": 4, "target_modules": (r".*\.[02]\.mlp\.(gate|up)_proj",)}),
    ("llama", {}, {"r": 4, "target_modules": ("q_proj",), "modules_to_save": ("lm_head", "embed_tokens")}),
    ("qwen2", {}, {"r": 3, "target_modules": ("all-linear",)}),
    ("gemma3_text", {}, {"r": 3, "target_modules": ("all-linear",)}),
    ("phi3", {}, {"r": 3, "target_modules": ("qkv_proj", "gate_up_proj")}),
    ("gpt2", {}, {"r": 3, "use_dora": True, "target_modules": ("all-linear",)}),
    ("gpt_oss", GPT_OSS, {"r": 2, "target_modules": ("all-linear",)}),
    (
        "gpt_oss",
        GPT_OSS,
        {"r": 2, "target_parameters": ("1.mlp.experts.gate_up_proj", "mlp.experts.down_proj")},
    ),
    ("qwen3_moe", EXPERTS, {"r": 2, "target_modules": (), "target_parameters": ("gate_up_proj", "gate.weight")}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}, {"target_modules": ("all-linear",)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "settings"), CASES)
def test_counts_are_those_of_the_targets(
    name: str, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    config, model = config_and_model(name, changes)
    shape, lora = read_shape(config), LoraConfig(enabled=True, **settings)
    assert shape is not None
    expected = sum(math.prod(s) for target in find_targets(model, lora) for s in target.shapes.values())
    assert expected > 0
    assert count_adapters(shape, lora).trainable == expected


def test_the_count_of_peft_itself() -> None:
    config, model = config_and_model("gpt_oss", GPT_OSS)
    shape = read_shape(config)
    assert shape is not None
    names = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=names)
    peft.inject_adapter_in_model(adapters, model, "default", low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = LoraConfig(enabled=True, r=4, target_modules=("q_proj", "o_proj"), target_parameters=tuple(names))
    assert count_adapters(shape, lora).trainable == trained


def test_a_token_meets_the_adapters_of_its_experts_only() -> None:
    shape = published_shape("openai/gpt-oss-20b")
    assert shape is not None
    lora = LoraConfig(enabled=True, r=8, target_modules=(), target_parameters=("7.mlp.experts.down_proj",))
    counted = count_adapters(shape, lora)
    assert counted.trainable == 32 * 8 * (2880 + 2880)
    assert counted.matmul == 4 * 8 * (2880 + 2880)


def test_what_four_bits_hold() -> None:
    shape = published_shape("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert shape is not None
    # all but the embedding, which is the head too, and the norms
    assert count_adapters(shape, LoraConfig(enabled=True, quantize="4bit")).quantized == (
        134_515_008 - 49152 * 576 - 61 * 576
    )
    assert count_adapters(shape, LoraConfig(enabled=True)).quantized == 0
