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
