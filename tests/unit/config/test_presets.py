"""The shipped presets are what the documentation says."""

from __future__ import annotations

import pytest

from tests.unit.config.test_load import load
from trainway.config.source import preset_descriptions, preset_names, preset_text
from trainway.planning.arithmetic import count_parameters
from trainway.planning.geometry import describe_plan, resolve_geometry


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_described(name: str) -> None:
    config = load(name)
    assert config.description.endswith(".")
    assert preset_descriptions()[name] == config.description
    assert resolve_geometry(config, 1).total_steps == config.train.total_steps
    assert preset_text(name.replace("_", "-")) == preset_text(name)


@pytest.mark.parametrize(
    ("name", "total", "hidden", "layers", "heads"),
    [
        ("cpu_small", 5_868_800, 256, 6, 4),
        ("m3_medium", 22_026_624, 384, 8, 6),  # R24: 22M
        ("runpod_1b", 1_030_309_888, 2048, 20, 32),
        ("runpod_2b", 1_961_617_920, 2560, 24, 40),  # R25: 1.97B within 1 %
        ("runpod_4b", 3_722_382_336, 3072, 32, 48),
    ],
)
def test_sizes(name: str, total: int, hidden: int, layers: int, heads: int) -> None:
    config = load(name)
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (
        hidden,
        layers,
        heads,
    )
    assert describe_plan(config)["parameters"]["total"] == total
    assert count_parameters(config.model, config.tokenizer.vocab_size).total == total


def test_cloud_presets() -> None:
    two, four = load("runpod_2b"), load("runpod_4b")
    assert (two.train.micro_batch_size, two.train.grad_accum_steps, two.train.precision) == (
        2,
        64,
        "bf16",
    )  # R25
    assert (four.train.micro_batch_size, four.train.grad_accum_steps) == (1, 256)  # R25
    assert four.train.activation_checkpointing == "full"
    for name in ("runpod_1b", "runpod_2b", "runpod_4b"):
        config = load(name)
        assert (config.schedule.name, config.train.total_steps, config.train.seq_len) == (
            "cosine",
            400_000,
            2048,
        )  # R26
        assert config.data.train == (f"/workspace/datasets/train/{name.replace('_', '-')}",)
        assert (config.runs_dir, config.data.store_dir) == ("/workspace/runs", "/workspace/cache")
