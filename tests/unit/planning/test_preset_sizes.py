"""The presets have the sizes that their names promise, and the plan counts what is really built."""

from __future__ import annotations

import json

import pytest

from tests.conftest import run_cli
from trainway.config.load import load_config, preset_names
from trainway.models.load import build_model
from trainway.planning.geometry import planned_vocab_size


@pytest.mark.parametrize(
    ("name", "promised", "within"), [("runpod_2b", 1.97e9, 0.01), ("m3_medium", 22e6, 0.05)]
)
def test_config_show_names_the_promised_size(name: str, promised: float, within: float) -> None:
    shown = json.loads(run_cli("config", "show", name, "--json").stdout)
    assert shown["plan"]["parameters"]["total"] == pytest.approx(promised, rel=within)


@pytest.mark.parametrize(
    "name", [name for name in preset_names() if load_config(name).config.model.path is None]
)
def test_size_equals_the_model_on_the_meta_device(name: str) -> None:
    config = load_config(name).config
    vocab_size = planned_vocab_size(config)
    assert vocab_size is not None
    built = build_model(config.model, vocab_size, seed=0, device="meta")
    shown = json.loads(run_cli("config", "show", name, "--json").stdout)
    assert shown["plan"]["parameters"]["total"] == sum(p.numel() for p in built.parameters())
