"""The fused forwards against transformers' own modules, values and gradients."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from trainway.config.schema import ModelConfig
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.fused import rms_norm, rotary, swiglu
from trainway.models.load import build_model


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    angles = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (draw(2, 3, 8), draw(8)))
    assert torch.autograd.gradcheck(swiglu, (draw(2, 3, 8), draw(2, 3, 8)))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), draw(2, 4, 5, 6))


def test_parts_equal_transformers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 6, generator=generator)
    angles = torch.randn(2, 5, 3, generator=generator).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotary(x, angles.cos(), angles.sin()), expected)
    norm = LlamaRMSNorm(6, eps=1e-5)
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_model_equals_its_unfused_self(architecture, num_kv_heads):
    config = ModelConfig(
        architecture=architecture, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=num_kv_heads,
        intermediate_size=96, init_std=0.1,
    )  # fmt: skip
    fused = CausalLMLoss(build_model(config, 128, seed=0))
    plain = copy.deepcopy(fused)
    replaced = [module for module in plain.modules() if module.__dict__.pop("forward", None)]
    assert len(replaced) == 3 * (4 if architecture == "llama" else 6) + 1
    ids = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = [module(ids[:, :-1], ids[:, 1:], None, (0, 20, 32, 64)) for module in (fused, plain)]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), name


def test_a_copy_trains_its_own_weights():
    module = CausalLMLoss(
        build_model(ModelConfig(hidden_size=32, num_layers=1, intermediate_size=48), 64, seed=0)
    )
    duplicate = copy.deepcopy(module)
    ids = torch.arange(16)[None]
    duplicate(ids, ids).backward()
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in duplicate.parameters())
