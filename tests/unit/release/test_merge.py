"""Adapters leave a run as peft's files or merged into one plain model; both say what base and adapter say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import run_cli
from tests.lora_models import EXPERTS, adapted, logits, plain, save_base, stir
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import write_model
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError, DataError
from trainway.release.bundle import export, model_directory
from trainway.release.generate import generate_text, load_causal_lm

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ("all-linear",), "rank_pattern": {"up_proj": 2}}),
    "llama, tied": ("llama-tied", {"use_rslora": True}),
    "llama, dora and head": ("llama", {"use_dora": True, "modules_to_save": ("lm_head",)}),
    "qwen3-moe": ("qwen3-moe", {"target_parameters": ("experts.down_proj",)}),
    "gpt-oss": ("gpt-oss", {"target_parameters": EXPERTS}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 64))]
    words_only = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_run(root: Path, case: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    """A run that has saved an adapter on the base in `root`/base, and the model that it had in memory."""
    family, settings = CASES[case]
    base = plain(family, dtype)
    save_base(base, root / "base")
    model = adapted(base, family, LoraConfig(enabled=True, r=4, alpha=8.0, **settings), dtype=dtype)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    stir(model)
    store = CheckpointStore(root / "run" / "checkpoints", keep_last=1)
    store.save(7, lambda temp: write_model(model, temp / "model", tokenizer()), best=True)
    (root / "run" / "config.yaml").write_text(
        json.dumps({"recipe": "sft", "data": {"store_dir": str(root / "cache")}})
    )
    return root / "run", model


@pytest.mark.parametrize("case", CASES)
def test_merged_and_apart_say_the_same(case: str, tmp_path: Path) -> None:
    run, trained = make_run(tmp_path, case)
    expected = logits(trained)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(logits(base), expected, atol=1e-2)

    apart = export(run, tmp_path / "apart")
    theirs = peft.PeftModel.from_pretrained(base, apart).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=0)
    loaded, _ = load_causal_lm(run / "checkpoints" / "step-7" / "model")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)

    merged = export(run, tmp_path / "merged", merge=True)
    assert not list(merged.glob("adapter*"))
    whole, told = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert {name: p.shape for name, p in whole.named_parameters()} == {
        name: p.shape for name, p in plain(CASES[case][0]).named_parameters()
    }
    torch.testing.assert_close(logits(whole.eval()), expected, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged)("w9 w10")["input_ids"] == [9, 10]
    prompt = torch.tensor([[9, 10, 11]])
    texts = [m.generate(prompt, max_new_tokens=12, do_sample=False) for m in (trained, loaded, theirs, whole)]
    assert texts[0].shape[1] > 6
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_a_run_with_an_adapter_speaks(tmp_path: Path) -> None:
    """Its own directory, the exported adapter, and the merged model, which is on its own."""
    run, _ = make_run(tmp_path, "llama")
    places = (run, export(run, tmp_path / "apart"), export(run, tmp_path / "merged", merge=True))
    texts = {generate_text(place, "w9 w10 w11", max_new_tokens=12) for place in places}
    assert len(texts) == 1
    assert len(texts.pop().split()) > 3


def test_a_bf16_base_is_merged_with_one_rounding(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "gpt-oss", torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "merged", merge=True), dtype="auto")
    assert merged.dtype == torch.bfloat16
    exact, _ = load_causal_lm(model_directory(run))
    layer = exact.model.layers[1]
    query = layer.self_attn.q_proj
    wanted = {
        "self_attn.q_proj.weight": query.base_layer.weight + query.get_delta_weight("default"),
        "mlp.experts.down_proj": layer.mlp.experts.get_param()
        + layer.mlp.experts.get_delta_weight("default"),
        "mlp.experts.gate_up_proj": layer.mlp.experts.base_layer.get_param()
        + layer.mlp.experts.base_layer.get_delta_weight("default"),
    }
    for name, weight in wanted.items():
        assert torch.equal(merged.get_parameter(f"model.layers.1.{name}"), weight.bfloat16()), name


def test_a_lost_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "gpt-oss")
    apart = export(run, tmp_path / "apart")
    path = apart / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    tensors["base_model.model.model.layers.9.lora_A.weight"] = tensors.pop(lost)
    save_file(tensors, path)
    with pytest.raises(DataError) as caught:
        load_causal_lm(apart)
    assert (
        caught.value.why == f"{lost} is missing; base_model.model.model.layers.9.lora_A.weight is unexpected"
    )


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama")
    apart = export(run, tmp_path / "apart")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        load_causal_lm(apart)
    assert caught.value.what == f"the base of the adapter in {tmp_path / 'apart'} was not found"
    assert str(tmp_path / "base") in caught.value.why
    assert "correct base_model_name_or_path in adapter_config.json" in caught.value.fix


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path: Path) -> None:
    run, model = make_run(tmp_path, "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.nan
    store = CheckpointStore(run / "checkpoints", keep_last=1)
    store.save(8, lambda temp: write_model(model, temp / "model", tokenizer()), best=True)
    with pytest.raises(
        DataError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight is not finite with its adapter"
    ):
        export(run, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_the_command_merges_what_has_an_adapter(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama")
    done = run_cli("export", run, "--out", tmp_path / "merged", "--merge")
    assert done.stdout.splitlines()[-1] == f"ok: {tmp_path / 'merged'}"
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == ["model.safetensors"]
    store = CheckpointStore(tmp_path / "full" / "checkpoints", keep_last=1)
    store.save(1, lambda temp: write_model(plain("llama"), temp / "model", tokenizer()), best=True)
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "full", tmp_path / "again", merge=True)
    assert str(caught.value) == (
        f"{tmp_path / 'full'} has no adapter to merge\nit trained the whole model\nleave --merge out"
    )
