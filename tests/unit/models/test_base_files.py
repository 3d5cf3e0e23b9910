"""Directories that hold no usable model: every missing file is named, nothing runs, and the message says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.base_models import save, tiny_model
from trainway.errors import ConfigError, DataError
from trainway.models.base import build_base, find_base


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(
        tiny_model("llama"), tmp_path_factory.mktemp("good") / "tiny-llama", max_shard_size="40KB"
    )
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return directory


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "tiny-llama")


def find(directory: Path | str, **settings: Any) -> Any:
    return find_base(str(directory), cache=Path(directory).absolute().parent / "cache", **settings)


def change(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def test_every_missing_file_is_named(model: Path) -> None:
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    for name in ("config.json", "tokenizer.json", shards[0], shards[2]):
        (model / name).unlink()
    with pytest.raises(DataError) as error:
        find(model)
    assert error.value.what == f"{model}: 4 files are missing"
    assert error.value.why == f"{model} lacks config.json, tokenizer.json, {shards[0]}, {shards[2]}"


def test_one_missing_shard(model: Path) -> None:
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    (model / shards[1]).unlink()
    with pytest.raises(DataError) as error:
        find(model)
    assert (error.value.what, error.value.why) == (
        f"{model}: a file is missing",
        f"{model} lacks {shards[1]}",
    )


def test_an_empty_directory_and_shards_without_their_index(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        find(tmp_path / "empty")
    assert error.value.why.endswith(
        "lacks config.json, tokenizer.json, model.safetensors, or model.safetensors.index.json and the files that it names"
    )
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(DataError) as error:
        find(model)
    assert error.value.why == f"{model} lacks model.safetensors.index.json"


def test_another_tokenizer_may_be_used(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert find(model, needs_tokenizer=False).config.model_type == "llama"
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(DataError) as error:
        find(model)
    assert error.value.why == f"{model} lacks tokenizer.json (tokenizer.model alone is not enough)"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "bytes, and its header says"),
        (lambda file: file.write_bytes(file.read_bytes() + b"12345"), "bytes, and its header says"),
        (lambda file: file.write_bytes(b""), "its 0 bytes are not those of a safetensors file"),
        (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "are not those of a safetensors file"),
        (lambda file: file.write_bytes((40).to_bytes(8, "little") + b"x" * 60), "its header cannot be read"),
    ],
    ids=["truncated", "longer", "empty", "lfs pointer", "no JSON"],
)  # fmt: skip
def test_damaged_shards_are_named(model: Path, damage: Callable[[Path], None], why: str) -> None:
    shards = sorted(model.glob("*.safetensors"))
    damage(shards[1])
    with pytest.raises(DataError) as error:
        find(model)
    assert error.value.what == f"{model}: a weight file is damaged"
    assert error.value.why.startswith(f"{shards[1].name}: ") and why in error.value.why
    damage(shards[2])
    with pytest.raises(DataError) as error:
        find(model)
    assert shards[1].name in error.value.why and shards[2].name in error.value.why


def test_an_index_that_does_not_fit(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == shards[0])
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: shards[1]}}))
    with pytest.raises(DataError, match="does not match its index") as error:
        find(model)
    assert name in error.value.why
    for wrong in ("../secret.safetensors", "/etc/passwd", "model.bin"):
        path.write_text(json.dumps({"weight_map": {name: wrong}}))
        with pytest.raises(DataError, match="malformed"):
            find(model)


def test_paths_that_do_not_exist(model: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find(model.with_name("tiny-lama"))
    assert error.value.what == f"the model {model.with_name('tiny-lama')} was not found"
    assert error.value.fix == f"did you mean {model}?"
    with pytest.raises(ConfigError, match="is a file") as error:
        find(model / "config.json")
    with pytest.raises(ConfigError, match="is set, and") as error:
        find(model, revision="main")
    assert error.value.fix == "leave model.revision out"


def test_pickles_are_refused_with_the_cure(model: Path) -> None:
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ConfigError) as error:
        find(model)
    assert error.value.what == f"{model} holds its weights in pytorch_model.bin alone"
    assert "save_pretrained" in error.value.fix


def test_adapters_gguf_and_pieces(tmp_path: Path, model: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    with pytest.raises(ConfigError) as error:
        find(adapter)
    assert error.value.what == f"{adapter} is an adapter, not a model"
    assert error.value.why == "it belongs to the base model someone/base"
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "tiny.Q4.gguf").write_bytes(b"GGUF")
    for path in (gguf, gguf / "tiny.Q4.gguf"):
        with pytest.raises(ConfigError, match="is a GGUF file"):
            find(path)
    for path in model.glob("model*"):
        path.unlink()
    (model / "model.part-00000-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is in pieces") as error:
        find(model)
    assert "trainway export" in error.value.fix


@pytest.mark.parametrize(
    ("changes", "what", "why"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, not a causal language model", "no head"),
        ({"architectures": ["LlamaModel"]}, "is a LlamaModel, not a causal language model", "no head"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration, not a plain causal language model", "encoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "is a ViTModel, not a causal language model", "no head"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "is a Gemma3ForConditionalGeneration, not a plain causal language model", "and others"),
        ({"model_type": "llamma"}, "the model type 'llamma' is unknown to transformers", "llama"),
        ({"model_type": None}, "its config.json names no model_type", ""),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model(model: Path, changes: dict[str, Any], what: str, why: str) -> None:
    change(model, **changes)
    with pytest.raises(ConfigError) as error:
        find(model)
    assert what in error.value.what and why in error.value.why


def test_weights_of_another_shape(model: Path) -> None:
    change(model, hidden_size=64)
    with pytest.raises(DataError, match="do not fit its config") as error:
        find(model)
    assert "model.embed_tokens.weight is [80, 32] instead of [80, 64]" in error.value.why


# ---- code of a repository

CODE = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM

class CanaryConfig(LlamaConfig):
    model_type = "songbird"

class CanaryForCausalLM(LlamaForCausalLM):
    config_class = CanaryConfig
"""


@pytest.fixture
def canary(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model whose code writes a file when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "canary_model.py").write_text(CODE.format(canary=str(tmp_path / "ran")))
    code = {
        "AutoConfig": "canary_model.CanaryConfig",
        "AutoModelForCausalLM": "canary_model.CanaryForCausalLM",
    }
    change(model, model_type="songbird", architectures=["CanaryForCausalLM"], auto_map=code)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["canary_model.CanaryTokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path / "ran"


def test_code_never_runs_without_trust(model: Path, canary: Path) -> None:
    from trainway.data.tokenizer import load_tokenizer

    with pytest.raises(ConfigError) as error:
        find(model)
    assert error.value.what == (
        f"{model} needs Python code of its own (canary_model.CanaryConfig, canary_model.CanaryForCausalLM)"
    )
    load_tokenizer(model)
    change(model, model_type="llama")  # transformers has this one itself
    base = find(model)
    assert base.notes == (f"the Python code of {model} is not run: transformers' own of llama is used",)
    assert type(build_base(base, dtype=torch.float32)).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


def test_code_runs_when_it_is_trusted(model: Path, canary: Path) -> None:
    base = find(model, trust_remote_code=True)
    assert canary.exists()
    assert type(build_base(base, dtype=torch.float32)).__name__ == "CanaryForCausalLM"
    assert "is run" in base.notes[0]


def test_code_of_a_third_repository_is_refused_even_then(model: Path, canary: Path) -> None:
    change(model, auto_map={"AutoModelForCausalLM": "someone/else--canary_model.CanaryForCausalLM"})
    with pytest.raises(ConfigError, match="takes its Python code from another repository"):
        find(model, trust_remote_code=True)
    assert not canary.exists()
