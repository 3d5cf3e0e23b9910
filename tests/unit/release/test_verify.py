"""An export is what was trained, and a difference is found: every tensor, the logits, the endings, the sums."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.release_material import finished_run
from tests.unit.release.test_merge import make_run
from trainway.checkpoint.weights import INDEX_FILE
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.models import qlora
from trainway.release import bundle, verify
from trainway.release.bundle import Merge, adapter_base, export
from trainway.release.verify import verify_export

MODEL = Path("checkpoints/step-7/model")


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_export_says_what_it_checked(tmp_path: Path) -> None:
    run, trained = finished_run(tmp_path, "qwen3_moe", steps=2)
    said: list[str] = []
    out = export(run / "checkpoints" / "step-2", tmp_path / "out", max_shard_size="20KB", say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "transformers loads it",
        "logits of 72 tokens",
        "greedy text of 64 tokens",
        "tokenizer",
        "generation stops at '<|im_end|>'",
        "SHA256SUMS",
    ]
    shards = list(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and (out / INDEX_FILE).exists()
    assert max(path.stat().st_size for path in shards) < 60_000
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=0, atol=1e-5)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True, capture_output=True
    )
    files = {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    listed = (out / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in listed} == files


def test_generation_stops_where_a_turn_ends(tmp_path: Path) -> None:
    """The template's end of turn is not the tokenizer's end of text: both are ends, and pad is the tokenizer's."""
    run, _ = finished_run(tmp_path, "llama")
    out = export(run, tmp_path / "out")
    tokenizer, config = (
        AutoTokenizer.from_pretrained(out),
        json.loads((out / "generation_config.json").read_text()),
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|eos|>" and tokenizer.chat_template
    assert config["eos_token_id"] == sorted([tokenizer.eos_token_id, end])
    assert config["pad_token_id"] == tokenizer.pad_token_id
    (out / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    with pytest.raises(DataError, match="not what was trained") as caught:
        verify_export(run / "checkpoints" / "step-1" / "model", out, None)
    assert caught.value.why == "'<|im_end|>' ends an answer, and generation goes on there"


@pytest.mark.slow
def test_texts_of_a_pretrained_model_begin_as_its_documents(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path, "llama", recipe="pretrain")
    out = export(run, tmp_path / "out")
    before, after = (
        AutoTokenizer.from_pretrained(place) for place in (run / "checkpoints/step-1/model", out)
    )
    ids = before("def area", add_special_tokens=False)["input_ids"]
    assert before("def area")["input_ids"] == ids
    assert after("def area")["input_ids"] == [after.bos_token_id, *ids]
    chat, _ = finished_run(tmp_path / "chat", "llama")
    tuned = AutoTokenizer.from_pretrained(export(chat, tmp_path / "tuned"))
    assert tuned("def area")["input_ids"][0] != tuned.bos_token_id


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t["model.layers.1.mlp.up_proj.weight"][3].mul_(1.001), "is not as it was trained"),
        pytest.param(
            lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing", marks=pytest.mark.slow
        ),
        pytest.param(lambda t: t.update(extra=torch.ones(2)), "extra is of no use", marks=pytest.mark.slow),
    ],
)
def test_tampered_weights_are_found(tmp_path: Path, change: Any, why: str) -> None:
    run, _ = finished_run(tmp_path, "llama")
    out = export(run, tmp_path / "out")
    edit(out / "model.safetensors", change)
    with pytest.raises(DataError) as caught:
        verify_export(run / "checkpoints" / "step-1" / "model", out, None)
    assert caught.value.what == "what was exported is not what was trained"
    assert why in caught.value.why


@pytest.mark.slow
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished_run(tmp_path, "llama")
    publish = bundle.publish

    def broken(source: Path, out: Path, **how: Any) -> None:
        publish(source, out, **how)
        edit(out / "model.safetensors", lambda tensors: tensors["model.embed_tokens.weight"][9].zero_())

    monkeypatch.setattr(bundle, "publish", broken)
    with pytest.raises(DataError, match="not what was trained"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert export(run, tmp_path / "out", verify=False).is_dir()


def test_a_dropped_adapter_tensor_is_found_at_export_and_at_load(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "qwen3-moe")
    out = export(run, tmp_path / "out")
    path, lost = (
        out / "adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    )
    edit(path, lambda tensors: tensors.pop(lost))
    with pytest.raises(DataError) as caught:
        verify_export(run / MODEL, out, None)
    assert caught.value.why == f"{lost} is missing"
    renamed = lost.replace("q_proj", "r_proj")
    edit(path, lambda tensors: tensors.update({renamed: torch.zeros(32, 4)}))
    with pytest.raises(DataError) as caught:
        verify_export(run / MODEL, out, None)
    assert caught.value.why == f"{lost} is missing; {renamed} is not of the checkpoint"
    # peft itself only warns: what it made up of nothing is compared, too
    base = adapter_base(out)
    with pytest.raises(DataError) as caught:
        verify._load_by_peft(out, base)
    assert caught.value.why == f"peft does not load {renamed}; peft makes up {lost}"


@pytest.mark.slow
def test_a_merge_that_lost_an_adapter_is_found(tmp_path: Path) -> None:
    """Its tensors are all there and of the right shape: only their values tell."""
    run, _ = make_run(tmp_path, "qwen3-moe", torch.bfloat16)
    said: list[str] = []
    out = export(run, tmp_path / "out", merge=True, say=said.append)
    (rounding,) = [line for line in said if line.startswith("rounding the merged weights to bfloat16")]
    assert 0 < float(rounding.split()[-1]) < 1
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = load_file(tmp_path / "base" / "model.safetensors")[name]
    assert plain.dtype == torch.bfloat16
    edit(out / "model.safetensors", lambda tensors: tensors.update({name: plain.clone()}))
    with pytest.raises(DataError) as caught:
        verify_export(run / MODEL, out, Merge(adapter_base(run / MODEL)))
    assert caught.value.why == f"{name} is not as it was trained"


@pytest.mark.slow
def test_logits_alone_are_enough_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished_run(tmp_path, "llama")
    out = export(run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20_000.0  # no tensor of a file
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError) as caught:
        verify_export(run / "checkpoints" / "step-1" / "model", out, None)
    assert caught.value.why.startswith("the largest difference of its logits is ")


def test_an_adapter_of_a_base_in_4_bits_is_merged_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path, "llama")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"lora": {"enabled": True, "quantize": "4bit"}}))
    with pytest.raises(ConfigError) as caught:
        export(run, tmp_path / "out", merge=True)
    assert caught.value.what == f"the adapter of {run} was trained on its base in 4 bits"
    assert "another model than the one that was trained" in caught.value.why
    assert "--merge-into dequantized" in caught.value.fix and "--merge-into published" in caught.value.fix
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="needs bitsandbytes"):
        export(run, tmp_path / "out", merge_into="dequantized")
    # what is merged into is what it is told: here a base of another scale stands for the rounded one
    state = {name: 1.5 * tensor for name, tensor in load_file(tmp_path / "base/model.safetensors").items()}
    monkeypatch.setattr(qlora, "dequantized_weights", lambda base: qlora.StoredWeights(state))
    scaled, plain = (
        load_file(export(run, tmp_path / into, merge_into=into) / "model.safetensors")  # type: ignore[arg-type]
        for into in ("dequantized", "published")
    )
    torch.testing.assert_close(scaled["model.embed_tokens.weight"], 1.5 * plain["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(scaled[name] - plain[name], 0.5 * state[name] / 1.5)


def test_an_unquantised_base_has_no_dequantised_one(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama")
    with pytest.raises(ConfigError, match="did not quantise its base"):
        export(run, tmp_path / "out", merge_into="dequantized")


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished_run(tmp_path, "llama")
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: free)
    with pytest.raises(EnvironmentFault, match="verifying takes") as caught:
        export(run, tmp_path / "out", verify=True)
    assert "leave --verify out" in caught.value.fix
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    export(run, tmp_path / "out", say=said.append)  # a paid run is not to end without its model
    assert said[0].startswith("not verified: verifying takes") and len(said) == 2


def test_sizes_of_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size is 'big'"):
        export(tmp_path, tmp_path / "out", max_shard_size="big")
