"""gpt-oss: sinks, windows and experts in packed rows against transformers' eager attention on each document alone."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.architectures import VOCAB, tiny_model
from trainway.losses import IGNORE_INDEX
from trainway.models.attention_choice import use_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.fused import fuse_blocks

BOUNDARIES = (0, 9, 18, 24, 25, 48)


def _batch():
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, VOCAB, (2, 2, 24), generator=generator)
    labels[1, 5:20] = IGNORE_INDEX
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDARIES)]).view(2, 24)
    return ids, labels, positions


def _ours(plain):
    model = copy.deepcopy(plain)
    assert use_attention(model, "auto", packed=True, device="cpu") == "packed"
    return model


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_all_gradients(kv_heads, fused):
    plain = tiny_model("gpt_oss", num_key_value_heads=kv_heads)
    assert plain.config._attn_implementation == "eager"
    model = _ours(plain)
    if fused:
        fuse_blocks(model)
    ids, labels, positions = _batch()
    targets = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    loss = CausalLMLoss(model, chunk_tokens=7)(ids, labels, positions, BOUNDARIES, targets)
    loss.backward()
    expected = 0.0
    for start, stop in pairwise(BOUNDARIES):
        logits = plain(ids.flatten()[None, start:stop], use_cache=False).logits[0]
        alone = F.cross_entropy(
            logits, labels.flatten()[start:stop], reduction="sum", ignore_index=IGNORE_INDEX
        )
        alone.backward()
        expected += alone.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    sinks = 0
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6, name
        if name.endswith("sinks"):
            assert b.grad.abs().min() > 1e-3, name
            sinks += 1
    assert sinks == 2


def test_generation_keeps_sinks_and_windows():
    plain = tiny_model("gpt_oss")
    model = _ours(plain)
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    ours, theirs = model.generate(ids, **settings), plain.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(policy):
    plain = tiny_model("gpt_oss").train()
    kept, again = _ours(plain), _ours(plain)
    checkpoint_activations(again.model.layers, policy)
    losses = [CausalLMLoss(model)(*_batch(), BOUNDARIES) for model in (kept, again)]
    assert torch.equal(*losses)
    [loss.backward() for loss in losses]
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_compiled_blocks_go_on_in_packed_rows():
    plain = tiny_model("gpt_oss")
    model, compiled = _ours(plain), _ours(plain)
    for layer in compiled.model.layers:
        layer.self_attn.compile(backend="eager")
    losses = [CausalLMLoss(m)(*_batch(), BOUNDARIES) for m in (model, compiled)]
    torch.testing.assert_close(*losses)
    [loss.backward() for loss in losses]
    sinks = [m.model.layers[0].self_attn.sinks.grad for m in (model, compiled)]
    torch.testing.assert_close(*sinks)
