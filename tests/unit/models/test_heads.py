"""Summed losses and log-probabilities against each architecture's own logits: scales, caps and biases, adapters, targets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from tests.unit.models.architectures import SPECS, VOCAB, tiny_model
from trainway import losses
from trainway.errors import ConfigError
from trainway.losses import IGNORE_INDEX, LogitForm, linear_log_probs
from trainway.models import causal_lm, heads
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.heads import linear_head, own_head_loss, own_log_probs, own_logits

OWN = ["glm4", "falcon", "falcon-alibi", "bloom", "mpt", "mamba", "jamba", "qwen3_next"]


def _batch():
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, VOCAB, (2, 2, 13), generator=generator)
    labels[0, :4] = IGNORE_INDEX
    return ids, labels


def _expected(model, ids, labels, z_loss=0.0):
    logits = model(input_ids=ids, use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    return torch.stack([nll, z_loss * (logits.logsumexp(-1)[labels != IGNORE_INDEX] ** 2).sum()])


def _assert_equal(ours, theirs, sums, expected):
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if b[1].grad is None:
            assert a.grad is None, name
        else:
            assert (a.grad - b[1].grad).norm() <= 1e-4 * b[1].grad.norm() + 1e-5, name


@pytest.mark.parametrize("name", SPECS)
def test_loss_equals_transformers_own(name):
    plain = tiny_model(name).train()
    model = copy.deepcopy(plain)
    assert (linear_head(model) is None) == (name in OWN)
    ids, labels = _batch()
    sums = CausalLMLoss(model, chunk_tokens=5, z_loss=0.01)(ids, labels)
    expected = _expected(plain, ids, labels, 0.01)
    sums.sum().backward()
    expected.sum().backward()
    _assert_equal(model, plain, sums, expected)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "opt"])
def test_the_own_head_of_any_model(name):
    """The slower way, taken for unknown classes, on every class there is."""
    plain = tiny_model(name)
    model = copy.deepcopy(plain)
    hidden = 3 * torch.randn(13, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    labels = _batch()[1].flatten()[:13]
    linear = linear_head(model)
    if linear is not None:
        head, form = linear
        logits = head(hidden) * form.scale
        logits = logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
        torch.testing.assert_close(own_logits(model, hidden), logits)
    both = [hidden.clone().requires_grad_() for _ in range(2)]
    loss = own_head_loss(model, both[0], labels, 4)
    loss.backward()
    expected = F.cross_entropy(own_logits(plain, both[1]), labels, reduction="sum", ignore_index=IGNORE_INDEX)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(both[0].grad, both[1].grad, rtol=1e-4, atol=1e-6)
    assert loss.ndim == 0 and model.get_output_embeddings().weight.grad.norm() > 0


def test_every_known_head_is_tested():
    assert set(heads._FORMS) == {type(tiny_model(name)).__name__ for name in SPECS if name not in OWN}


def test_forms():
    assert linear_head(tiny_model("granite"))[1] == LogitForm(scale=1 / 2.5)
    assert linear_head(tiny_model("cohere2"))[1] == LogitForm(scale=0.4)
    assert linear_head(tiny_model("gemma2"))[1] == LogitForm(softcap=3.0)
    assert linear_head(tiny_model("phi"))[0].bias is not None


def test_a_class_of_the_same_name_from_elsewhere_is_not_known():
    model = tiny_model("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.llama"})
    assert linear_head(model) is None


def test_an_adapter_on_the_head_is_part_of_it():
    plain = tiny_model("llama")
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False), plain
    )
    model = copy.deepcopy(plain)
    assert linear_head(model) is None
    ids, labels = _batch()
    sums = CausalLMLoss(model, chunk_tokens=5)(ids, labels)
    expected = _expected(plain, ids, labels)[0]
    sums.backward()
    expected.backward()
    _assert_equal(model, plain, sums, expected)
    assert model.lm_head.lora_A["default"].weight.grad.norm() > 0


def test_a_head_that_is_trained_beside_adapters():
    plain = tiny_model("granite")
    adapters = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    )
    inject_adapter_in_model(adapters, plain)
    model = copy.deepcopy(plain)
    ids, labels = _batch()
    sums = CausalLMLoss(model, chunk_tokens=5)(ids, labels)
    expected = _expected(plain, ids, labels)[0]
    sums.backward()
    expected.backward()
    _assert_equal(model, plain, sums, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "lm_head.modules_to_save.default.weight" in trained and len(trained) == 5


def test_a_frozen_head_has_no_gradient_made(monkeypatch):
    """With LoRA the head is frozen: of its chunks no [V, H] gradient is summed."""
    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    seen = []
    apply = torch.autograd.Function.apply.__func__
    monkeypatch.setattr(
        losses._LinearCrossEntropy,
        "apply",
        classmethod(lambda cls, *args: seen.append(args[-1]) or apply(cls, *args)),
    )
    CausalLMLoss(model)(*_batch()).backward()
    assert seen == [(True, False, False)]
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is None


def test_a_forward_that_goes_round_its_body_is_refused(monkeypatch):
    model = tiny_model("opt")
    monkeypatch.delitem(heads._FORMS, "OPTForCausalLM")
    with pytest.raises(ConfigError, match="OPTForCausalLM cannot be trained"):
        CausalLMLoss(model)(*_batch())


@pytest.mark.parametrize("name", ["llama", "glm4", "gemma2"])
def test_targets_select_the_same_rows(name):
    ids, labels = _batch()
    targets = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    models = [tiny_model(name) for _ in range(2)]
    found = [
        CausalLMLoss(model, chunk_tokens=5)(ids, labels, targets=given)
        for model, given in zip(models, (targets, None), strict=True)
    ]
    torch.testing.assert_close(*found)
    [loss.backward() for loss in found]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["llama", "glm4"])
@pytest.mark.parametrize("given", [True, False])
def test_no_targets_at_all_is_zero_for_every_parameter(name, given):
    ids, labels = _batch()
    model = tiny_model(name)
    targets = torch.empty(0, dtype=torch.long) if given else None
    loss = CausalLMLoss(model)(ids, torch.full_like(labels, IGNORE_INDEX), targets=targets)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_targets_alone_reach_the_head(monkeypatch):
    rows = []
    right = causal_lm.linear_cross_entropy
    monkeypatch.setattr(
        causal_lm,
        "linear_cross_entropy",
        lambda hidden, *a, **k: rows.append(len(hidden)) or right(hidden, *a, **k),
    )
    CausalLMLoss(tiny_model("llama"))(*_batch(), targets=torch.tensor([5, 9, 20]))
    assert rows == [3]


@pytest.mark.parametrize("name", [name for name in SPECS if name != "opt"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_by_the_own_head_of_any_model(name, temperature):
    plain = tiny_model(name)
    model = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(13, model.config.hidden_size, generator=generator)
    pull = torch.randn(13, generator=generator)
    labels = _batch()[1].flatten()[:13]
    both = [hidden.clone().requires_grad_() for _ in range(2)]
    found, entropy = own_log_probs(model, both[0], labels, 4, temperature)
    (found * pull).sum().backward()
    log_probs = torch.log_softmax(own_logits(plain, both[1]) / temperature, -1)
    ignored = labels == IGNORE_INDEX
    expected = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(ignored, 0.0)
    (expected * pull).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(both[0].grad, both[1].grad, rtol=1e-4, atol=1e-6)
    ours, theirs = (m.get_output_embeddings().weight.grad for m in (model, plain))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    entropies = -(log_probs.exp() * log_probs).sum(-1).masked_fill(ignored, 0.0).detach()
    torch.testing.assert_close(entropy, entropies, rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad and ignored.any() and entropy[~ignored].min() > 0
    linear = linear_head(model)
    if linear is not None:
        head, form = linear
        also = linear_log_probs(
            hidden, head.weight, labels, 4, temperature=temperature, bias=head.bias, form=form
        )
        torch.testing.assert_close(also, (found.detach(), entropy))


def test_no_log_probs_by_the_own_head_are_empty_with_zero_gradients():
    model = tiny_model("glm4")
    hidden = torch.randn(0, model.config.hidden_size, requires_grad=True)
    log_probs, entropy = own_log_probs(model, hidden, torch.empty(0, dtype=torch.long), 4)
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == (0,)
    assert not model.get_output_embeddings().weight.grad.any()
