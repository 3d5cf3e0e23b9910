"""The written configuration gives the same run, and a fingerprint tells runs apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.config.test_load import STEPS, load
from trainway.config.load import config_difference, config_schema, dump_config, fingerprint, load_config
from trainway.config.names import field_table
from trainway.config.source import preset_names


@pytest.mark.parametrize("name", preset_names())
def test_a_dumped_configuration_loads_as_the_same_run(tmp_path: Path, name: str) -> None:
    config = load(name)
    text = dump_config(config)
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(tmp_path / "config.yaml", environ={}).config
    assert again == config
    assert dump_config(again) == text
    assert text.startswith(f"recipe: {config.recipe}\n")


def test_settings_without_effect_are_left_out_of_the_dump(tmp_path: Path) -> None:
    config = load("cpu_small", ["data.validation=v.txt", "tokenizer.path=tok"])
    text = dump_config(config)
    assert "val_ratio" not in text
    assert "sample_mib" not in text
    assert "muon_lr" not in text
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(tmp_path / "config.yaml", environ={}).config
    assert config_difference(fingerprint(config), fingerprint(again)) == []


CHANGEABLE = """
log.every=3 report_to=none save_every=7 eval.every=7 name=x runs_dir=y run_dir=z description=d engine.timeout_s=5
micro_batch_size=2 grad_accum_steps=3 num_threads=1 compile=true activation_checkpointing=full loss_chunk_tokens=9
prefetch_steps=9 store_dir=c engine=zero3 after_training=false
"""


@pytest.mark.parametrize("word", CHANGEABLE.split())
def test_settings_that_may_change_between_resumes(word: str) -> None:
    assert config_difference(fingerprint(load()), fingerprint(load(STEPS, [word]))) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=1", "seed: 42 -> 1"),
        ("optim.lr=0.1", "optim.lr: 0.0006 -> 0.1"),
        ("seq_len=64", "train.seq_len: 512 -> 64"),
        ("data.train=a", "data.train: [] -> ['a']"),
        ("global_batch_size=64", "train.global_batch_size: None -> 64"),
        ("val_ratio=0.2", "data.val_ratio: 0.01 -> 0.2"),
    ],
)
def test_settings_that_may_not(word: str, line: str) -> None:
    assert config_difference(fingerprint(load()), fingerprint(load(STEPS, [word]))) == [line]


def test_a_resolved_batch_compares_by_its_size() -> None:
    one = fingerprint(load(STEPS, ["micro_batch_size=8", "grad_accum_steps=4"]), 32)
    two = fingerprint(load(STEPS, ["micro_batch_size=4", "global_batch_size=32"]), 32)
    assert config_difference(one, two) == []


def test_an_absent_key_is_a_difference() -> None:
    assert config_difference({"a": 1, "b": None}, {"a": 1, "c": 2}) == ["b: None -> absent", "c: absent -> 2"]


def test_the_schema_describes_every_setting() -> None:
    schema = config_schema()
    json.dumps(schema)
    for key in field_table():
        section, _, leaf = key.rpartition(".")
        place = schema
        if section:
            name = schema["properties"][section]["$ref"].rpartition("/")[2]
            place = schema["$defs"][name]
        assert place["properties"][leaf].get("description"), key
    assert schema["additionalProperties"] is False
