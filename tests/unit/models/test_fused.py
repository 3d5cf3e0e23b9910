"""The fused forwards against transformers' own modules, values and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.unit.models.architectures import SPECS, VOCAB, tiny_model
from trainway.config.schema import ModelConfig
from trainway.models.attention import use_packed_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.fused import _FUSED, fuse_blocks, rms_norm, rotary, swiglu
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


FAMILIES = {
    "llama": 9, "llama-biased": 9, "qwen2": 9, "qwen2-window": 9, "qwen3": 13, "qwen3_moe": 11, "mistral": 9, "granite": 9,
    "mixtral": 7, "olmo2": 11, "phi3": 5, "smollm3": 7, "deepseek_v3": 11, "gpt_oss": 5,
}  # fmt: skip
"""How many modules of each family's two layers are fused."""


def test_every_known_family_is_tested():
    assert set(_FUSED) == {SPECS[name][0] for name in FAMILIES}


def _pair(name, prepare=lambda model: None):
    """A model in packed attention, fused and not."""
    plain = tiny_model(name)
    prepare(plain)
    use_packed_attention(plain)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    return fused, plain


def _compare(fused, plain):
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, VOCAB, (2, 2, 24), generator=generator)
    positions = torch.cat([torch.arange(n) for n in (7, 11, 6, 9, 15)]).view(2, 24)
    losses = [CausalLMLoss(model)(ids, labels, positions, (0, 7, 18, 24, 33, 48)) for model in (fused, plain)]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad and (a.grad is None) == (b.grad is None), name
        assert b.grad is None or (a.grad - b.grad).norm() <= 2e-5 * b.grad.norm() + 1e-6, name


def _replaced(model):
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_its_unfused_self(name):
    fused, plain = _pair(name)
    assert len(_replaced(fused)) == FAMILIES[name] and not _replaced(plain)
    _compare(fused.train(), plain.train())


@pytest.mark.parametrize(
    "name", ["gemma", "gemma2", "gemma3_text", "cohere2", "olmo3", "glm4", "phi", "stablelm", "qwen3_next"]
)
def test_other_families_stay_as_they_are(name):
    model = tiny_model(name)
    fuse_blocks(model)
    assert not _replaced(model)


def test_other_activations_and_dropouts_stay_as_they_are():
    model = tiny_model("llama", hidden_act="gelu", attention_dropout=0.1)
    fuse_blocks(model)
    assert {type(module).__name__ for module in _replaced(model)} == {"LlamaRMSNorm"}


def test_a_class_of_the_same_name_from_elsewhere_stays_as_it_is():
    model = tiny_model("llama")
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.__class__ = type("LlamaMLP", (type(module),), {"__module__": "transformers_modules.mine"})
    fuse_blocks(model)
    assert not any(type(module).__name__ == "LlamaMLP" for module in _replaced(model))


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-window", "qwen3", "mistral"])
def test_adapters_are_kept(name):
    """q_proj is then an adapter's layer; the frozen rest gets no gradient, and the adapters the right ones."""

    def adapt(model):
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)

    fused, plain = _pair(name, adapt)
    assert len(_replaced(fused)) == FAMILIES[name]
    _compare(fused.train(), plain.train())
    trained = [name for name, parameter in fused.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 2 * 5 and all("lora" in name for name in trained)


@pytest.mark.parametrize("frozen", [["norm"], ["proj"], ["embed", "layers.0"]])
def test_frozen_parts(frozen):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))

    _compare(*_pair("llama", freeze))


class _Count(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_norms_make_only_the_gradients_that_are_wanted():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, dtype=torch.bfloat16)
    out = rms_norm(x, weight, 1e-5)  # frozen weights may be bf16 under fp32 activations
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(out, expected)
    grad = torch.randn(5, 8)
    with _Count() as count:
        (of_x,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(of_x, torch.autograd.grad(expected, x, grad)[0])
    assert "aten::mv" in count.names and "aten::mm" not in count.names
    weight.requires_grad_()
    out = rms_norm(x.detach(), weight, 1e-5)
    with _Count() as count:
        (of_weight,) = torch.autograd.grad(out, weight, grad)
    assert of_weight.dtype == torch.bfloat16
    assert "aten::mm" in count.names and "aten::mv" not in count.names
