"""What a release of an adapter, of a merged model and of a run with much around it consists of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests.lora_models import logits
from tests.unit.release.test_merge import make_run
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError
from trainway.release.allowed import CARD, SUMS, Left
from trainway.release.base_id import Base
from trainway.release.contents import chosen_step, make_contents, open_contents, order_key, read_run
from trainway.release.order import Contents, Order
from trainway.release.publish import plan_order, release
from trainway.run_dir import RunDir

ORDER = Order(repo="ada/tuned", tag="v0.1", which="best", licence="mit")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with an adapter on a base in a directory, its settings as training writes them."""
    path, _ = make_run(tmp_path, "llama")
    settings = {
        "recipe": "sft",
        "run_dir": str(path),
        "model": {"path": str(tmp_path / "base")},
        "data": {
            "train": [str(tmp_path / "chats.jsonl"), "hf://org/chats"],
            "store_dir": str(tmp_path / "cache"),
        },
        "lora": {"enabled": True, "r": 4},
        "rollout": {},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    provenance = {
        "hostname": "secret-host", "argv": ["trainway", "train", str(tmp_path)], "config_hash": "1f", "data_hash": "2e",
        "base_model": {"path": str(tmp_path / "base"), "commit": None}, "datasets": ["org/chats"],
    }  # fmt: skip
    (path / "provenance.json").write_text(json.dumps(provenance))
    return RunDir(path)


def made(run: RunDir, tmp_path: Path, order: Order = ORDER) -> tuple[Contents, list[str]]:
    said: list[str] = []
    return make_contents(run, order, 7, tmp_path / "out", said.append), said


def test_an_adapter_whose_base_is_only_here_names_no_place(run: RunDir, tmp_path: Path) -> None:
    contents, said = made(run, tmp_path)
    assert {file.path for file in contents.files} == {
        CARD, SUMS, "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training/config.yaml", "training/provenance.json",
    }  # fmt: skip
    adapter = json.loads((contents.directory / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None
    assert said == [
        f"the adapter names no base model: {contents.base.reason}; --merge makes a model that needs none"
    ]
    whole = b"".join((contents.directory / file.path).read_bytes() for file in contents.files)
    assert str(tmp_path).encode() not in whole and b"secret-host" not in whole
    told = yaml.safe_load((contents.directory / "training/config.yaml").read_text())
    assert told["model"]["path"] == "base" and told["data"]["train"] == ["chats.jsonl", "hf://org/chats"]
    assert "run_dir" not in told and "store_dir" not in told["data"]
    assert "base_model" not in ModelCard.load(contents.directory / CARD).data.to_dict()


def test_an_adapter_whose_base_is_named_is_found_by_peft(run: RunDir, tmp_path: Path) -> None:
    contents, said = made(run, tmp_path, plan_order(read_run(run)[0], repo="ada/tuned", base="org/base"))
    assert said == [] and contents.base == Base("org/base")
    adapter = json.loads((contents.directory / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/base"
    data = ModelCard.load(contents.directory / CARD).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert data["library_name"] == "peft" and data["datasets"] == ["org/chats"]


def test_a_merged_one_stands_alone(run: RunDir, tmp_path: Path) -> None:
    contents, _ = made(
        run, tmp_path, plan_order(read_run(run)[0], repo="ada/tuned", merge=True, base="org/base")
    )
    names = {file.path for file in contents.files}
    assert "model.safetensors" in names and not [name for name in names if name.startswith("adapter")]
    data = ModelCard.load(contents.directory / CARD).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    trained = AutoModelForCausalLM.from_pretrained(contents.directory).eval()
    _, memory = make_run(tmp_path / "memory", "llama")
    torch.testing.assert_close(logits(trained), logits(memory), rtol=0, atol=1e-4)


def test_the_same_order_makes_the_same_bytes_and_a_changed_one_is_noticed(
    run: RunDir, tmp_path: Path
) -> None:
    first, _ = made(run, tmp_path)
    second = make_contents(run, ORDER, 7, tmp_path / "second", lambda line: None)
    assert [(file.path, file.sha256) for file in first.files] == [(f.path, f.sha256) for f in second.files]
    assert open_contents(first.directory, first.base) == first
    for name, change in (("tokenizer.json", b"{}"), ("notes.txt", b"x"), ("adapter_config.json", None)):
        place = second.directory / name
        before = place.read_bytes() if place.exists() else None
        place.unlink() if change is None else place.write_bytes(change)
        with pytest.raises(DataError) as caught:
            open_contents(second.directory, second.base)
        assert name in caught.value.what
        place.unlink(missing_ok=True)
        if before is not None:
            place.write_bytes(before)


def test_what_the_checkpoint_holds_beside_the_model_stays(run: RunDir, tmp_path: Path) -> None:
    from trainway.checkpoint.store import CheckpointStore

    source = run.checkpoints / "step-7" / "model"

    def write(temp: Path) -> None:
        import shutil

        shutil.copytree(source, temp / "model")
        (temp / "model" / "modeling_own.py").write_text("print()")
        (temp / "model" / "notes.txt").write_text("mine")

    CheckpointStore(run.checkpoints, keep_last=2).save(9, write, best=True)
    contents = make_contents(run, ORDER, chosen_step(run, "best"), tmp_path / "out", lambda line: None)
    assert contents.left == (
        Left("modeling_own.py", "Python code"),
        Left("notes.txt", "not one of a model's files"),
    )
    assert not (contents.directory / "notes.txt").exists()
    assert chosen_step(run, "latest") == 9 and chosen_step(run, 7) == 7
    with pytest.raises(ConfigError, match="has no checkpoint of step 8"):
        chosen_step(run, 8)
    assert order_key(run, ORDER, 7) != order_key(run, ORDER, 9)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "no repository is named"),
        ({"repo": "model"}, "repo is 'model'"),
        ({"repo": "../x"}, "repo is '../x'"),
        ({"repo": "a/b\nc"}, "repo is 'a/b\\nc'"),
        ({"repo": "a/b", "tag": "v0.1; rm"}, "tag is 'v0.1; rm'"),
        ({"repo": "a/b", "tag": ".lock"}, "tag is '.lock'"),
        ({"repo": "a/b", "licence": "MIT License"}, "licence is 'MIT License'"),
        ({"repo": "a/b", "base": "/models/base"}, "base is '/models/base'"),
    ],
)
def test_names_are_checked(given: dict[str, str], what: str) -> None:
    config = RunConfig()
    with pytest.raises(ConfigError) as caught:
        plan_order(config, **given)
    assert caught.value.what == what
    assert caught.value.fix


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        release(tmp_path, repo="a/b", dry_run=True)
    (tmp_path / "config.yaml").write_text("data: {train: [x.jsonl]}\n")
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        release(tmp_path, repo="a/b", dry_run=True)
