"""Adapters on a base in 4 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.lora_models import SHAPE, logits, stir, tokens
from trainway.checkpoint.weights import load_model, model_pieces, write_model
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models import qlora
from trainway.models.base import BaseModel, find_base
from trainway.models.load import allocate
from trainway.models.lora import AdaptedWeights, inject_lora
from trainway.models.merge import load_adapted
from trainway.models.qlora import LoadedWeights, load_quantized

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    """Wide enough for blocks of 64 numbers with a scale of their own."""
    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
    return find_base(str(tmp_path / "base"), cache=tmp_path / "cache", needs_tokenizer=False)


def quantized(base: BaseModel, **settings: Any) -> Any:
    model = load_quantized(base, device="cpu")
    found = inject_lora(model, LoraConfig(enabled=True, r=4, quantize="4bit", **settings), base.source)
    allocate(model, model, device="cpu")
    AdaptedWeights(LoadedWeights(), 3)(model_pieces(model).items())
    return model, found


def test_without_bitsandbytes_it_says_what_to_install(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        load_quantized(base, device="cpu")
    assert str(caught.value) == (
        "lora.quantize=4bit needs bitsandbytes\nit is not installed\n"
        "pip install 'trainway[qlora]', or set lora.quantize=none"
    )


def test_dora_needs_weights_that_are_not_quantised(base: BaseModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.directory)
    with pytest.raises(ConfigError, match=r"^lora\.use_dora with lora\.quantize=4bit"):
        inject_lora(model, LoraConfig(enabled=True, quantize="4bit", use_dora=True))


@needs_bitsandbytes
def test_adapters_learn_on_a_base_in_4_bits(base: BaseModel, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    model, found = quantized(base, target_modules=("all-linear",))
    assert found.total == sum(p.numel() for p in plain.parameters()) + found.trainable
    assert [place for place in found.places if "gate_proj" in place] == ["2 x mlp.gate_proj (r 4)"]
    for layer, exact in zip(model.model.layers, plain.model.layers, strict=True):
        rounded = dequantize_module_weight(layer.mlp.up_proj.base_layer)
        error = (rounded - exact.mlp.up_proj.weight).norm() / exact.mlp.up_proj.weight.norm()
        assert error.item() == pytest.approx(0.095, abs=0.01)  # of normal values in blocks of 64
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert sum(p.dtype == torch.uint8 for p in frozen.values()) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
        )
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    write_model(model, tmp_path / "adapter")
    again, _ = quantized(base, target_modules=("all-linear",))
    load_model(again, tmp_path / "adapter")
    assert torch.equal(logits(again.train()), logits(model))
    whole = load_adapted(tmp_path / "adapter", base, torch.float32)
    assert (logits(whole) - logits(model)).abs().mean() < 0.5 * logits(whole).abs().mean()


@needs_bitsandbytes
def test_a_copy_of_the_head_is_trained_beside_4_bits(base: BaseModel) -> None:
    model, _ = quantized(base, modules_to_save=("lm_head",))
    plain = AutoModelForCausalLM.from_pretrained(base.directory)
    copy = model.lm_head.modules_to_save["default"].weight
    assert copy.dtype == torch.float32
    assert torch.equal(copy, plain.lm_head.weight.bfloat16().float())
    stir(model)
