"""A configuration written as YAML and as TOML loads to the same run, whatever was set."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

from trainway.config.files import config_values, toml_text, yaml_text
from trainway.config.load import load_config, preset_names
from trainway.config.schema import RunConfig


def round_trip(config: RunConfig, folder: Path) -> RunConfig:
    values = config_values(config)
    (folder / "run.yaml").write_text(yaml_text(values))
    (folder / "run.toml").write_text(toml_text(values))
    assert yaml.safe_load(yaml_text(values)) == tomllib.loads(toml_text(values)) == values
    loaded = [load_config(folder / f"run.{kind}", environ={}).config for kind in ("yaml", "toml")]
    assert loaded[0] == loaded[1]
    return loaded[0]


@pytest.mark.parametrize("name", preset_names())
def test_presets(name: str, tmp_path: Path) -> None:
    config = load_config(name, environ={}).config
    assert round_trip(config, tmp_path) == config


def test_what_is_empty_by_choice_stays_empty(tmp_path: Path) -> None:
    config = load_config(
        "m3_medium", ["eval.max_tokens=null", "name=a: 'b' \"c\"", "seed=7"], environ={}
    ).config
    assert config.eval.max_tokens is None
    loaded = round_trip(config, tmp_path)
    assert (loaded.eval.max_tokens, loaded.name, loaded) == (None, "a: 'b' \"c\"", config)
    assert config_values(config)["eval"]["max_tokens"] == "none"
    assert "tokenizer.path" not in config_values(config)


def test_a_mix_of_sources(tmp_path: Path) -> None:
    mix = [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl", "weight": 1.0, "name": "b"}]
    config = load_config({"data": {"train": mix}, "train": {"total_steps": 1000}}, environ={}).config
    assert round_trip(config, tmp_path) == config
