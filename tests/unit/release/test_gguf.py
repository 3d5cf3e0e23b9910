"""A GGUF file says what the exported model says, read back by transformers; families that were not proved are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoTokenizer

from tests.release_material import finished_run
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.release import gguf
from trainway.release.bundle import export
from trainway.release.gguf import write_gguf

CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "f32", {"tie_word_embeddings": False}),
    ("llama", "q8_0", {"head_dim": 16}),
    ("qwen2", "f16", {}),
    ("qwen3", "f32", {}),
    ("qwen3", "bf16", {"tie_word_embeddings": False}),
)


@pytest.mark.parametrize(
    ("family", "kind", "model"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1] in ("f16", "bf16") else []) for case in CASES],
)
def test_it_is_read_back_as_it_was(family: str, kind: Any, model: dict[str, Any], tmp_path: Path) -> None:
    run, trained = finished_run(tmp_path, family, **model)
    said: list[str] = []
    out = export(run, tmp_path / "out", gguf=kind, say=said.append)
    path = out / f"out-{kind}.gguf"
    (line,) = [line for line in said if line.startswith(path.name)]
    assert "read back, its logits are" in line
    reader = GGUFReader(path)
    tied = trained.config.tie_word_embeddings
    assert ("output.weight" in {tensor.name for tensor in reader.tensors}) == (not tied)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == GGMLQuantizationType[kind.upper()]
    assert types["blk.0.attn_norm.weight"] == GGMLQuantizationType.F32
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = {name: int(reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()) for name in ("eos", "eot")}
    assert ids == {"eos": tokenizer.eos_token_id, "eot": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smaug-bpe"
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    heads = reader.fields[f"{family}.attention.key_length"].contents()
    assert int(heads) == trained.model.layers[0].self_attn.head_dim
    assert path.name in (out / "SHA256SUMS").read_text()


def test_rows_in_another_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: llama's rows left as transformers has them."""
    run, _ = finished_run(tmp_path, "llama")
    out = export(run, tmp_path / "out")
    monkeypatch.setattr(gguf, "_interleaved", lambda weight, heads: weight)
    with pytest.raises(DataError, match="the GGUF file is not the exported model") as caught:
        write_gguf(out, out / "wrong.gguf", "f32")
    assert caught.value.why.startswith("its logits are ")


def test_what_was_not_proved_is_refused(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path, "gemma2")
    with pytest.raises(ConfigError) as caught:
        export(run, tmp_path / "out", gguf="f16")
    assert caught.value.what == "--gguf knows llama, qwen2, qwen3, and this is a gemma2"
    assert not (tmp_path / "out").exists()
    config = tmp_path / "run" / "checkpoints" / "step-1" / "model" / "config.json"
    fields = json.loads(config.read_text()) | {"model_type": "llama"}
    for changed, named in (
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type llama3"),
        ({"rope_parameters": None, "attention_bias": True}, "attention_bias True"),
    ):
        config.write_text(json.dumps(fields | changed))
        with pytest.raises(ConfigError, match=f"a llama with {named}"):
            gguf.check_family(config.parent, None)


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path, "llama")
    path = run / "checkpoints" / "step-1" / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="--gguf does not know how this tokenizer cuts text"):
        gguf.check_family(path.parent, None)


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished_run(tmp_path, "llama")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        export(run, tmp_path / "out", gguf="f32")
    assert caught.value.fix == "pip install 'trainway[gguf]'"


def test_rotated_rows_are_paired() -> None:
    weight = torch.arange(8.0)[:, None]
    assert gguf._interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
