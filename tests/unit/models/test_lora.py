"""Adapters land where they are asked for, begin as peft's do, and are computed as peft computes them."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from tests.lora_models import (
    EXPERTS,
    adapted,
    logits,
    on_meta,
    plain,
    save_base,
    stir,
    tokens,
)
from trainway.checkpoint.adapter import base_name, saved_pieces
from trainway.checkpoint.optimizer_state import optimizer_slots
from trainway.checkpoint.snapshot import Snapshot
from trainway.checkpoint.weights import load_model, model_pieces, write_model
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.models.lora import check_gradients, inject, inject_lora, landed
from trainway.models.lora_targets import find_targets

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all-linear": ("llama", {"target_modules": ("all-linear",)}),
    "llama, tied": ("llama-tied", {"target_modules": ("all-linear",)}),
    "llama, regex": ("llama", {"target_modules": (r".*\.1\.(mlp|self_attn)\.[a-z]+_proj",)}),
    "llama, dora": ("llama", {"use_dora": True, "target_modules": ("all-linear",)}),
    "llama, rslora": ("llama", {"use_rslora": True}),
    "llama, patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*_proj": 40.0}},
    ),
    "llama, head": ("llama", {"modules_to_save": ("lm_head", "model.norm")}),
    "qwen3-moe, default": ("qwen3-moe", {}),
    "qwen3-moe, all-linear": ("qwen3-moe", {"target_modules": ("all-linear",)}),
    "qwen3-moe, experts": (
        "qwen3-moe",
        {"target_modules": (), "target_parameters": ("experts.gate_up_proj", "experts.down_proj")},
    ),
    "gpt-oss, experts": ("gpt-oss", {"target_parameters": EXPERTS}),
    "gpt-oss, one expert": (
        "gpt-oss",
        {"target_modules": (), "target_parameters": EXPERTS[1:], "rank_pattern": {"down_proj": 2}},
    ),
}


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"enabled": True, "r": 4, "alpha": 8.0} | settings)


@pytest.mark.parametrize("case", CASES)
def test_an_adapted_model_computes_what_peft_s_does(case: str) -> None:
    """The same tensors in peft's own wrapper give the same logits, and gradients, bit for bit."""
    family, settings = CASES[case]
    base = plain(family)
    ours = adapted(base, family, lora_config(**settings))
    assert torch.equal(logits(ours), logits(base))  # B is zero
    stir(ours)
    config = peft.LoraConfig(**ours.peft_config["default"].to_dict() | {"inference_mode": False})
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    mine = {name: piece.tensor for name, piece in saved_pieces(ours, model_pieces(ours)).items()}
    assert mine.keys() == {
        f"{name}" for name in get_peft_model_state_dict(theirs, save_embedding_layers=False)
    }
    result = set_peft_model_state_dict(theirs, mine)
    assert not result.unexpected_keys
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(base), atol=1e-2)
    for model in (ours, theirs):
        model(tokens(), labels=tokens()).loss.backward()
    gradients = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_reads_what_was_saved(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = plain(family)
    ours = adapted(base, family, lora_config(**settings))
    stir(ours)
    write_model(ours, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain_base = AutoModelForCausalLM.from_pretrained(save_base(base, tmp_path / "base")).eval()
    theirs = peft.PeftModel.from_pretrained(plain_base, tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs), logits(ours))
    assert theirs.peft_config["default"].base_model_name_or_path == "org/base"
    again = adapted(base, family, lora_config(**settings))
    load_model(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))


def test_adapters_begin_as_peft_s_do() -> None:
    """A is uniform within 1 / sqrt(in), B zero, DoRA's magnitude what peft computes; all by the seed and the name."""
    base = plain("llama")
    lora = lora_config(r=64, target_modules=("all-linear",), use_dora=True)
    ours = {
        name: p.detach() for name, p in adapted(base, "llama", lora).named_parameters() if p.requires_grad
    }
    again = dict(adapted(base, "llama", lora).named_parameters())
    other = dict(adapted(base, "llama", lora, seed=4).named_parameters())
    fewer = dict(adapted(base, "llama", lora_config(r=64, target_modules=("up_proj",))).named_parameters())
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=64, target_modules="all-linear", use_dora=True)
    )
    reference = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    draws = []
    for name, parameter in ours.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, again[name])
        if ".lora_A." not in name:
            assert torch.equal(parameter, reference[name]), name
            continue
        bound = 1 / math.sqrt(parameter.shape[1])
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert parameter.std().item() == pytest.approx(reference[name].std().item(), rel=0.1)
        assert not torch.equal(parameter, other[name])
        if name in fewer:
            assert torch.equal(parameter, fewer[name])
        draws.append(tuple(parameter.flatten()[:4].tolist()))
    assert len(set(draws)) == len(draws) == 14


def test_the_adapter_of_a_bf16_model_is_fp32() -> None:
    model = adapted(
        plain("llama", torch.bfloat16),
        "llama",
        lora_config(modules_to_save=("lm_head",)),
        dtype=torch.bfloat16,
    )
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_what_is_trained_is_told() -> None:
    found = inject_lora(
        on_meta("gpt-oss"), lora_config(target_parameters=EXPERTS, rank_pattern={"down_proj": 2})
    )
    sizes = 2 * 4 * (32 + 32 + 2 * (32 + 16) + 32 + 32) + 4 * 4 * (32 + 48) + 2 * 4 * (24 + 32)
    base = sum(parameter.numel() for parameter in on_meta("gpt-oss").parameters())
    assert (found.trainable, found.total) == (sizes, base + sizes)
    assert str(found) == (
        f"trainable {sizes:,} of {base + sizes:,} parameters (11 %): 2 x self_attn.q_proj (r 4), "
        "2 x self_attn.k_proj (r 4), 2 x self_attn.v_proj (r 4), 2 x self_attn.o_proj (r 4), "
        "1 x mlp.experts.gate_up_proj (r 4), 1 x mlp.experts.down_proj (r 2)"
    )


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dropout": (
        "gpt-oss",
        {"target_parameters": EXPERTS, "dropout": 0.1},
        (
            "lora.dropout is 0.1 with lora.target_parameters\nthe adapter of a bare parameter, such as experts, is "
            "added to the parameter, and sees no input to drop\nset lora.dropout=0"
        ),
    ),
    "dora": (
        "gpt-oss",
        {"target_parameters": EXPERTS, "use_dora": True},
        "lora.use_dora with lora.target_parameters",
    ),
    "nothing": ("llama", {"target_modules": ()}, "lora.target_modules and lora.target_parameters are empty"),
    "misspelt": (
        "llama",
        {"target_modules": ("q_prj",)},
        (
            "lora.target_modules: 'q_prj' lands nowhere\nevery name must match something in the model\n"
            "did you mean q_proj, "
        ),
    ),
    "one of several": ("llama", {"target_modules": ("q_proj", "query")}, "'query' lands nowhere"),
    "longer": ("llama", {"target_modules": ("attn.q_proj",)}, "did you mean self_attn.q_proj"),
    "fused experts": (
        "qwen3-moe",
        {"target_modules": ("gate_proj", "up_proj", "down_proj")},
        "name them in lora.target_parameters (mlp.experts.gate_up_proj, mlp.experts.down_proj)",
    ),
    "parameter": (
        "gpt-oss",
        {"target_parameters": ("7.mlp.experts.gate_up_proj",)},
        (
            "lora.target_parameters: '7.mlp.experts.gate_up_proj' lands nowhere\nevery name must match something in the "
            "model\ndid you mean 1.mlp.experts.gate_up_proj, 0.mlp.experts.gate_up_proj"
        ),
    ),
    "bias": ("gpt-oss", {"target_parameters": ("norm.weight",)}, "names model.norm.weight of shape [32]"),
    "linear": (
        "gpt-oss",
        {"target_parameters": ("q_proj.weight",)},
        "name linear layers in lora.target_modules",
    ),
    "head": ("llama", {"target_modules": ("lm_head",)}, "'lm_head' names lm_head, the output head"),
    "embedding": ("llama", {"target_modules": ("embed_tokens",)}, "names model.embed_tokens, a Embedding"),
    "block": ("llama", {"target_modules": (".*mlp",)}, "names model.layers.0.mlp, a LlamaMLP"),
    "no regex": ("llama", {"target_modules": ("(q_proj",)}, "'(q_proj' is no regular expression"),
    "two kinds": (
        "llama",
        {"target_modules": ("all-linear", "q_proj")},
        "all-linear and a regular expression stand",
    ),
    "bad pattern": (
        "llama",
        {"alpha_pattern": {"q_proj(": 2.0}},
        "lora.alpha_pattern: 'q_proj(' is no regular",
    ),
    "pattern": ("llama", {"rank_pattern": {"up_proj": 2}}, "lora.rank_pattern: 'up_proj' lands nowhere"),
    "copy": ("llama", {"modules_to_save": ("lmhead",)}, "did you mean lm_head"),
    "loose copy": ("llama", {"modules_to_save": ("norm",)}, "lora.modules_to_save: 'norm' lands nowhere"),
    "tied copy": ("llama-tied", {"modules_to_save": ("lm_head",)}, "lm_head is tied to another module"),
    "both": (
        "llama",
        {"target_modules": ("up_proj",), "modules_to_save": ("layers.0.mlp",)},
        "model.layers.0.mlp.up_proj is named by lora.target_modules and by lora.modules_to_save",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_land_nowhere_are_refused(case: str) -> None:
    family, settings, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        inject_lora(on_meta(family), lora_config(**settings))
    assert message in str(caught.value)


def test_an_adapter_that_did_not_land_is_noticed() -> None:
    lora = lora_config(target_modules=("q_proj", "v_proj"))
    targets = find_targets(on_meta("llama"), lora)

    def adapters() -> Any:
        model = on_meta("llama")
        inject_lora(model, lora)
        return model

    landed(adapters(), targets)
    lost = adapters()
    del lost.model.layers[1].self_attn.v_proj.lora_B["default"]
    with pytest.raises(EnvironmentFault, match=r"has not put the adapters") as caught:
        landed(lost, targets)
    assert caught.value.why == "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight is missing"
    frozen = adapters()
    frozen.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    thawed = adapters()
    thawed.model.norm.weight.requires_grad_(True)
    half = adapters()
    half.model.layers[0].self_attn.q_proj.lora_A["default"].bfloat16()
    ranks = on_meta("llama")
    inject(ranks, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    more = on_meta("llama")
    inject(more, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for model, why in (
        (frozen, r"0\.self_attn\.q_proj\.lora_A\.weight is missing"),
        (thawed, r"model\.norm\.weight was not asked for"),
        (half, r"q_proj\.lora_A\.default\.weight is torch\.bfloat16"),
        (ranks, r"q_proj\.lora_A\.weight is \[2, 32\] instead of \[4, 32\]"),
        (more, r"up_proj\.lora_B\.weight was not asked for"),
    ):
        with pytest.raises(EnvironmentFault) as caught:
            landed(model, targets)
        assert re.search(why, caught.value.why), caught.value.why


@pytest.mark.parametrize("case", ["llama, all-linear", "llama, dora", "llama, head", "gpt-oss, experts"])
def test_every_adapter_learns_and_the_base_stays(case: str) -> None:
    """Three steps of AdamW: every B has a gradient from the first one on, every A from the second; no frozen bit moves."""
    family, settings = CASES[case]
    model = adapted(plain(family), family, lora_config(**settings)).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    pieces = model_pieces(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for step in range(3):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all()
                assert parameter.grad.any() == (step > 0 or ".lora_A." not in name), name
        optimizer.step()
        optimizer.zero_grad()
        check_gradients(model, Snapshot({}, optimizer_slots([optimizer], pieces), None))
    assert losses[2] < losses[1] < losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_an_adapter_without_a_gradient_is_named() -> None:
    model = adapted(plain("llama"), "llama", lora_config(target_modules=("q_proj", "up_proj"))).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, fused=True)
    model(tokens(), labels=tokens()).loss.backward()
    lost, zero, bad = (f"model.layers.{place}.default.weight" for place in
                       ("0.self_attn.q_proj.lora_A", "1.self_attn.q_proj.lora_B", "1.mlp.up_proj.lora_B"))  # fmt: skip
    trained[lost].grad = None
    trained[zero].grad.zero_()
    trained[bad].grad[0, 0] = math.inf
    optimizer.step()
    with pytest.raises(ConfigError) as caught:
        check_gradients(model, Snapshot({}, optimizer_slots([optimizer], model_pieces(model)), None))
    assert caught.value.what == "3 of 8 trained tensors got no gradient in the first step"
    assert caught.value.why == f"{lost} has none; that of {zero} is zero; that of {bad} is not finite"


def test_a_file_without_one_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = adapted(plain("llama"), "llama", lora_config())
    write_model(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(DataError) as caught:
        load_model(model, tmp_path)
    assert caught.value.why == "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight is missing"


def test_names_of_the_base() -> None:
    for family, settings in CASES.values():
        model = on_meta(family)
        names = {name for name, _ in model.named_parameters()}
        inject_lora(model, lora_config(**settings))
        found = [base_name(name) for name, p in model.named_parameters() if ".lora_" not in name]
        assert set(found) == names
