"""The shape read from a config.json has exactly the weights, by name and size, of transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Conv1D
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainway.config.schema import ModelConfig
from trainway.errors import DataError
from trainway.models.load import build_model
from trainway.planning.published import PUBLISHED
from trainway.planning.shapes import FAMILIES, new_shape, read_shape, shape_in

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {"olmo", "olmo2", "olmo3", "cohere", "phi3", "starcoder2", "granite", "granitemoe"}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES if name not in ("qwen2_moe", "qwen3_moe", "gpt_oss", "mixtral", "granitemoe")),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0]}),
    ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    ("starcoder2", {"use_bias": False}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 100}),
]  # fmt: skip


def config_and_model(name: str, changes: dict[str, Any]) -> tuple[dict[str, Any], torch.nn.Module]:
    """A small config.json as transformers writes it, and the model of it without memory."""
    base = (
        GPT2
        if name == "gpt2"
        else {k: v for k, v in SMALL.items() if k != "head_dim" or name not in NO_HEAD_DIM}
    )
    config = CONFIG_MAPPING[name](**{**base, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return json.loads(config.to_json_string(use_diff=False)), model


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_weights_are_those_of_the_model(name: str, changes: dict[str, Any]) -> None:
    config, model = config_and_model(name, changes)
    shape = read_shape(config)
    assert shape is not None
    assert {w.name: w.shape for w in shape.weights()} == {
        key: tuple(parameter.shape) for key, parameter in model.named_parameters()
    }
    linear = {
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    own = {w.name for w in shape.weights() if w.kind == "linear"}
    assert own == linear - ({"lm_head.weight"} if shape.tie_embeddings else set())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_weights_that_transformers_builds(name: str) -> None:
    """Full size, without memory: of every published model by name and shape, so the count is exact."""
    config = dict(PUBLISHED[name])
    shape = read_shape(config)
    assert shape is not None
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config, **ids))
    assert {w.name: w.shape for w in shape.weights()} == {
        key: tuple(parameter.shape) for key, parameter in model.named_parameters()
    }


def test_published_models_have_the_sizes_that_their_pages_give() -> None:
    """Parameters as the Hub counts them in the files."""
    counts = {
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
        "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
        "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
        "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
        "google/gemma-2-9b-it": 9_241_705_984,
        "google/gemma-3-1b-it": 999_885_952,
        "microsoft/phi-4": 14_659_507_200,
        "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
        "bigcode/starcoder2-7b": 7_173_923_840,
        "openai-community/gpt2": 124_439_808,
    }
    for name, count in counts.items():
        shape = read_shape(PUBLISHED[name])
        assert shape is not None
        assert sum(weight.size for weight in shape.weights()) == count, name
    assert len(PUBLISHED) >= 40
    assert {entry["model_type"] for entry in PUBLISHED.values()} >= {
        "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2",
        "smollm3", "granite", "glm4", "starcoder2", "gpt2", "gpt_oss",
    }  # fmt: skip


def test_a_small_file_means_its_familys_defaults() -> None:
    """What save_pretrained leaves out of config.json is what the family has by default."""
    for name in ("gemma2", "qwen2", "starcoder2", "cohere", "smollm3"):
        _, model = config_and_model(name, {})
        kept = {k: v for k, v in SMALL.items() if k != "head_dim" or name not in NO_HEAD_DIM}
        shape = read_shape({"model_type": name, **kept})
        assert shape is not None
        assert sum(w.size for w in shape.weights()) == sum(p.numel() for p in model.parameters()), name


def test_windows_of_sliding_attention() -> None:
    config, _ = config_and_model("gpt_oss", {"num_local_experts": 8, "sliding_window": 16})
    shape = read_shape(config)
    assert shape is not None
    assert [layer.window for layer in shape.layers] == [16, None, 16]
    assert [layer.active for layer in shape.layers] == [0.5] * 3


def test_a_new_models_shape_is_the_one_built() -> None:
    config = ModelConfig(architecture="qwen3", num_kv_heads=1, head_dim=32, tie_embeddings=False)
    built = build_model(config, 1024, seed=0, device="meta")
    named = {w.name: w.shape for w in new_shape(config, 1024).weights()}
    assert named == {key: tuple(p.shape) for key, p in built.named_parameters()}


def test_a_directory(tmp_path: Path) -> None:
    assert shape_in(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    found = shape_in(tmp_path)
    assert found is not None and found.hidden_size == 64
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert shape_in(tmp_path) is None
    for broken in ("{", '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(DataError, match=r"cannot read .*config\.json"):
            shape_in(tmp_path)
