"""Packed attention and the wrapped loss: every document as if it were alone; generation as transformers does it."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from trainway.config.schema import ModelConfig
from trainway.losses import IGNORE_INDEX
from trainway.models.attention import Segments
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.load import build_model

VOCAB = 64
BOUNDARIES = (0, 7, 14, 15, 24, 30, 48)  # two rows of 24; runs of equal and of different lengths


def _model(architecture="llama", num_kv_heads=None, tied=True):
    config = ModelConfig(
        architecture=architecture, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads,
        intermediate_size=48, max_seq_len=64, tie_embeddings=tied, init_std=0.2,
    )  # fmt: skip
    return CausalLMLoss(build_model(config, VOCAB, seed=0, eos_id=2, pad_id=3), chunk_tokens=11)


def _batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (2, 24), generator=generator)
    labels = torch.randint(4, VOCAB, (2, 24), generator=generator)
    labels[0, 3] = IGNORE_INDEX
    lengths = [b - a for a, b in pairwise(BOUNDARIES)]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 24)
    return ids, labels, positions


MODELS = [("llama", None, True), ("llama", 2, False), ("qwen3", 2, True), ("qwen3", 1, False)]


@pytest.mark.parametrize("spec", MODELS)
def test_packed_equals_each_document_alone(spec):
    packed, alone = _model(*spec), _model(*spec)
    ids, labels, positions = _batch()
    total = packed(ids, labels, positions, BOUNDARIES)
    total.backward()
    expected = torch.zeros(())
    for start, stop in pairwise(BOUNDARIES):
        document = ids.flatten()[None, start:stop], labels.flatten()[None, start:stop]
        logits = alone.model(document[0], use_cache=False).logits[0]
        loss = F.cross_entropy(logits, document[1][0], reduction="sum", ignore_index=IGNORE_INDEX)
        loss.backward()
        expected = expected + loss.detach()
        with torch.no_grad():
            torch.testing.assert_close(alone(*document), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-5, atol=0)
    for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_boundary_matters():
    module = _model()
    ids, labels, positions = _batch()
    packed = module(ids, labels, positions, BOUNDARIES)
    rows = module(ids, labels, positions, (0, 24, 48))
    assert abs(packed - rows) > 1e-2
    torch.testing.assert_close(module(ids, labels, positions), rows)


def test_a_token_never_sees_the_next_document():
    module = _model()
    ids, _, positions = _batch()
    changed = ids.clone()
    changed[0, 14:] = 5
    with torch.no_grad():
        a, b = (module.hidden(x, positions, BOUNDARIES) for x in (ids, changed))
    assert torch.equal(a[0, :14], b[0, :14]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0, 14:], b[0, 14:])


@pytest.mark.parametrize("spec", MODELS)
def test_generation_equals_sdpa(spec):
    model = _model(*spec).model.eval()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding: the mask has to be there
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    ours, theirs = model.generate(ids, **settings), plain.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))


def test_no_boundaries_masks_by_position_resets_as_transformers_does():
    module = _model()
    ids, _, positions = _batch()
    with torch.no_grad():
        masked = module.model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        packed = module.hidden(ids, positions, BOUNDARIES)
    torch.testing.assert_close(masked, packed, rtol=1e-4, atol=1e-5)


def _kept_bytes(module):
    """Bytes that autograd keeps between forward and backward, beside the parameters; and the loss."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*_batch(), BOUNDARIES)
    return sum(kept.values())


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(policy):
    plain, checkpointed = _model("qwen3", 2), _model("qwen3", 2)
    checkpoint_activations(checkpointed.model.model.layers, policy)
    if policy == "full":
        assert _kept_bytes(checkpointed.train()) < _kept_bytes(plain.train()) / 3
    losses = [module.train()(*_batch(), BOUNDARIES) for module in (plain, checkpointed)]
    assert torch.equal(*losses)
    [loss.backward() for loss in losses]
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    with torch.no_grad():
        assert torch.equal(checkpointed(*_batch(), BOUNDARIES), losses[0].detach())


def test_compiled_blocks_are_not_compiled_anew_for_other_boundaries():
    module, plain = _model(), _model()
    counter = CompileCounter()
    for layer in module.model.model.layers:
        layer.compile(backend=counter)
    ids, labels, positions = _batch()
    first = module(ids, labels, positions, BOUNDARIES)
    compiled = counter.frame_count
    for boundaries in ((0, 5, 24, 48), (0, 24, 31, 48), (0, 24, 48)):
        torch.testing.assert_close(
            module(ids, labels, positions, boundaries), plain(ids, labels, positions, boundaries)
        )
    torch.testing.assert_close(first, plain(ids, labels, positions, BOUNDARIES))
    assert 0 < counter.frame_count == compiled


def test_runs_group_neighbours_of_one_length():
    assert Segments(BOUNDARIES).runs == [(2, 7), (1, 1), (1, 9), (1, 6), (1, 18)]
    assert Segments((0, 8, 16, 24)).runs == [(3, 8)]


def test_state_under_autocast_stays_close():
    module = _model()
    ids, labels, positions = _batch()
    exact = module(ids, labels, positions, BOUNDARIES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(ids, labels, positions, BOUNDARIES)
    rounded.backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
