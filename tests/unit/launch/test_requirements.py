"""What a run needs is checked before anything starts, and named exactly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.unit.config.test_load import load
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.launch.requirements import check_requirements

SFT = {"recipe": "sft", "model": {"path": "org/model"}, "train": {"epochs": 1}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # R30: it checks requirements first
    config = load(SFT, [f"engine={engine}"])
    check_requirements(config)
    without(monkeypatch, "deepspeed")
    check_requirements(load(SFT))
    with pytest.raises(EnvironmentFault) as caught:
        check_requirements(config)
    assert caught.value.what == f"engine.name is {engine}, and DeepSpeed is not installed"
    assert "--no-build-isolation" in caught.value.fix


def test_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(EnvironmentFault, match="bitsandbytes is not installed"):
        check_requirements(load(SFT, ["lora.quantize=4bit"]))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["engine=zero3", "ds_config=zero.json"], "engine.ds_config is zero.json"),
        (["chat_template=mine.jinja"], "data.chat_template is mine.jinja"),
        (["model.path=./model"], "model.path is ./model"),
    ],
)
def test_files_of_the_configuration(words: list[str], what: str, tmp_path: Path) -> None:
    config = load(SFT, words)
    with pytest.raises(ConfigError) as caught:
        check_requirements(config)
    assert caught.value.what == what
    for name in ("zero.json", "mine.jinja"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    check_requirements(config)


def test_all_missing_conversations_are_named_and_the_optional_ones_are_not(tmp_path: Path) -> None:
    # S0: `queen_train.sh` fails fast when out/ is not there, and never makes it
    config = load("gpt_oss_20b_full", ["data.validation=val.jsonl"])
    with pytest.raises(DataError) as caught:
        check_requirements(config)
    assert caught.value.what == (
        "5 data files are missing: out/chatgpt.sft.jsonl, out/epub.sft.jsonl, out/memories.sft.jsonl, "
        "out/sent.sft.jsonl, val.jsonl"
    )
    assert caught.value.why == f"looked for from {tmp_path}"
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for name in ("out/chatgpt.sft.jsonl", "out/epub.sft.jsonl", "out/memories.sft.jsonl", "val.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"^a data file is missing: out/sent\.sft\.jsonl"):
        check_requirements(config)
    (tmp_path / "out/sent.sft.jsonl").touch()
    check_requirements(config)


def test_patterns_directories_and_hub_ids_are_for_the_preparation() -> None:
    check_requirements(load(SFT, ["data.train=chats/*.jsonl,data/train,HuggingFaceH4/Multilingual-Thinking"]))
    check_requirements(
        load({"train": {"total_steps": 5}, "data": {"train": ["no.jsonl"]}, "schedule.warmup_steps": 0})
    )
