"""The student's one module: each objective against plain transformers, however its tokens are laid out."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.architectures import VOCAB, tiny_model
from trainway.gad.losses import PolicyStats, policy_loss, pool_stats
from trainway.gad.student import LogProbs, Policy, StudentLoss
from trainway.losses import IGNORE_INDEX
from trainway.models.attention import use_packed_attention
from trainway.models.causal_lm import CausalLMLoss

LENGTHS = ((4, 6), (1, 3), (7, 1), (2, 9), (5, 5), (3, 8))
"""Tokens of each prompt and each answer."""
NUM_TOKENS = sum(answer for _, answer in LENGTHS)
FAMILIES = ["llama", "gemma2", "phi", "glm4"]
"""A plain head, one with a softcap, one with a bias, and one that is not known to be linear."""
T = 0.8


def _sequences():
    """(ids [P + T], tokens of the prompt) of each sequence."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(2, VOCAB, (p + t,), generator=generator), p) for p, t in LENGTHS]


def _per_token(num_tokens):
    """Advantages, old and reference log-probabilities' distances from the present ones, for all tokens."""
    noise = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise[0], 0.3 * noise[1], 0.2 * noise[2]


def _packed(sequences):
    """One row: the sequences one after another, and what else `StudentLoss` takes."""
    ids = torch.cat([ids for ids, _ in sequences])
    labels, positions, boundaries, targets = [], [], [0], []
    for row, prompt in sequences:
        start = boundaries[-1]
        boundaries.append(start + len(row))
        labels.append(torch.cat([row[1:], torch.tensor([IGNORE_INDEX])]))
        positions.append(torch.arange(len(row)))
        targets.append(torch.arange(start + prompt - 1, start + len(row) - 1))
    return {
        "input_ids": ids[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(positions)[None],
        "boundaries": tuple(boundaries),
        "targets": torch.cat(targets),
    }


def _padded(sequences, fill=0, more=0):
    """A row for each sequence, padded on the right."""
    width = max(len(ids) for ids, _ in sequences) + more
    ids = torch.full((len(sequences), width), fill)
    labels = torch.full((len(sequences), width), IGNORE_INDEX)
    targets = []
    for row, (tokens, prompt) in enumerate(sequences):
        ids[row, : len(tokens)], labels[row, : len(tokens) - 1] = tokens, tokens[1:]
        targets.append(torch.arange(prompt - 1, len(tokens) - 1) + row * width)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(width).expand(len(sequences), width),
        "boundaries": None,
        "targets": torch.cat(targets),
    }


def _student(family, packed=True):
    model = tiny_model(family).double()
    if packed:
        use_packed_attention(model)
    elif family != "gemma2":  # which has a softcap that sdpa knows not
        model.set_attn_implementation("sdpa")  # eager takes scores to fp32
    return StudentLoss(model, chunk_tokens=5)


def _policy(logp, tokens=slice(None), **changes):
    """The objective for some of the tokens, its old and reference log-probabilities near `logp` [all tokens]."""
    advantages, old, ref = _per_token(len(logp))
    return Policy(
        T, advantages[tokens], (logp + old)[tokens], (logp + ref)[tokens],
        **{"clip_range": 0.2, "dual_clip": 1.5, "kl_coef": 0.1} | changes,
    )  # fmt: skip


def _alone(model, sequences):
    """Log-probabilities and entropies of the answers by the model's own logits, each sequence by itself."""
    picked, entropies = [], []
    for ids, prompt in sequences:
        log_probs = torch.log_softmax(
            model(input_ids=ids[None], use_cache=False).logits[0, prompt - 1 : -1] / T, -1
        )
        picked.append(log_probs.gather(1, ids[prompt:, None])[:, 0])
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(picked), torch.cat(entropies)


def _assert_gradients(ours, theirs, tolerance=1e-7):
    total = sum(p.grad.norm() for p in theirs.parameters() if p.grad is not None)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
        else:
            assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm() + 1e-3 * tolerance * total, name
    assert total > 1e-3


@pytest.mark.parametrize("layout", [_packed, _padded])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_policy_equal_plain_transformers(family, layout):
    sequences = _sequences()
    student, plain = _student(family, layout is _packed), tiny_model(family).double()
    expected, expected_entropy = _alone(plain, sequences)
    logp, entropy = student(**layout(sequences), objective=LogProbs(T))
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-6, atol=1e-6)
    objective = _policy(expected.detach())
    loss, stats = student(**layout(sequences), objective=objective)
    whole, whole_stats = policy_loss(
        expected, *objective[1:4], clip_range=0.2, dual_clip=1.5, kl_coef=0.1, entropy=expected_entropy
    )
    loss.backward()
    whole.backward()
    torch.testing.assert_close(loss / NUM_TOKENS, whole / NUM_TOKENS, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats, torch.stack(whole_stats), rtol=1e-6, atol=1e-5)
    assert not stats.requires_grad and PolicyStats(*stats).clipped > 3
    _assert_gradients(student.model, plain, 1e-5)


@pytest.mark.parametrize("layout", [_packed, _padded])
@pytest.mark.parametrize("cut", [(0, 6), (0, 3, 6), (0, 1, 2, 3, 4, 5, 6), (0, 5, 5, 6)])
def test_any_split_into_micro_batches_is_the_same_loss(layout, cut):
    """Ranks are no other than micro-batches: both add sums. One part of the last split is empty."""
    sequences = _sequences()
    whole, student = _student("llama"), _student("llama", layout is _packed)
    with torch.no_grad():
        logp, _ = whole(**_packed(sequences), objective=LogProbs(T))
    expected, expected_stats = whole(**_packed(sequences), objective=_policy(logp))
    expected.backward()
    ends = [0, *torch.tensor([answer for _, answer in LENGTHS]).cumsum(0).tolist()]
    losses, stats = [], []
    for first, last in pairwise(cut):
        batch = layout(sequences[first:last] or sequences[:1])
        if first == last:
            batch["targets"] = batch["targets"][:0]
        loss, part = student(**batch, objective=_policy(logp, slice(ends[first], ends[last])))
        loss.backward()
        losses.append(loss.detach())
        stats.append(part)
    torch.testing.assert_close(sum(losses), expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        torch.stack(pool_stats(torch.stack(stats))), expected_stats, rtol=1e-6, atol=1e-9
    )
    _assert_gradients(student.model, whole.model)


def test_masked_tokens_have_no_effect_to_the_last_bit():
    """Padding's ids, and labels that are no targets, may be anything."""
    sequences = _sequences()
    results = []
    for fill, label in ((0, IGNORE_INDEX), (63, 5)):
        student = StudentLoss(tiny_model("llama"), chunk_tokens=5)
        batch = _padded(sequences, fill=fill)
        others = torch.ones(batch["labels"].numel(), dtype=torch.bool)
        others[batch["targets"]] = False
        batch["labels"].view(-1)[others] = label
        objective = _policy(torch.full((NUM_TOKENS,), -3.0))
        loss, stats = student(**batch, objective=objective)
        loss.backward()
        results.append((loss, stats, *(p.grad for p in student.parameters())))
    assert results[0][0].item() != 0.0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_padding_changes_nothing():
    sequences, found = _sequences(), []
    for more in (0, 11):
        student = _student("llama", packed=False)
        loss, _ = student(**_padded(sequences, more=more), objective=_policy(torch.full((NUM_TOKENS,), -3.0)))
        loss.backward()
        found.append((loss.detach(), student.model))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    _assert_gradients(found[1][1], found[0][1])


def test_values_follow_their_targets():
    """The same sequences in another order, their values with them, are the same loss."""
    sequences = _sequences()
    student = _student("llama")
    with torch.no_grad():
        logp, _ = student(**_packed(sequences), objective=LogProbs(T))
        objective = _policy(logp)
        expected, _ = student(**_packed(sequences), objective=objective)
        tokens = torch.arange(len(logp)).split([answer for _, answer in LENGTHS])
        order = torch.cat(tokens[::-1])
        moved = objective._replace(
            **{name: getattr(objective, name)[order] for name in ("advantages", "old_logp", "ref_logp")}
        )
        found, _ = student(**_packed(sequences[::-1]), objective=moved)
        mixed, _ = student(**_packed(sequences[::-1]), objective=objective)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (mixed - expected).abs() > 1e-2


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_on_policy_the_loss_is_that_of_the_first_update(family):
    """No old log-probabilities: the gradient is that of old ones equal to the present."""
    sequences = _sequences()
    students = [_student(family) for _ in range(2)]
    logp, _ = students[0](**_packed(sequences), objective=LogProbs(T))
    losses = [
        student(**_packed(sequences), objective=_policy(logp.detach())._replace(old_logp=old))[0]
        for student, old in zip(students, (None, logp.detach()), strict=True)
    ]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses)
    _assert_gradients(*(student.model for student in students))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "glm4"])
@pytest.mark.parametrize("objective", ["policy", "log-probs", "cross-entropy"])
def test_no_targets_use_every_parameter_with_zero_gradients(family, objective):
    student = StudentLoss(tiny_model(family).train())
    empty = torch.empty(0)
    wanted = {
        "policy": Policy(T, empty, empty, empty, 0.2, 3.0, 0.1),
        "log-probs": LogProbs(T),
        "cross-entropy": None,
    }
    batch = _padded(_sequences()) | {"targets": torch.empty(0, dtype=torch.long)}
    found = student(**batch, objective=wanted[objective])
    if objective == "policy":
        assert found[1].tolist() == [0.0] * 6
    loss = found[0].sum() if isinstance(found, tuple) else found
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_without_an_objective_it_is_the_cross_entropy():
    batch = _padded(_sequences())
    module, student = CausalLMLoss(tiny_model("llama"), 5), StudentLoss(tiny_model("llama"), 5)
    assert torch.equal(student(**batch), module(**batch))
    ids, labels, targets = batch["input_ids"], batch["labels"].flatten(), batch["targets"]
    logits = student.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(
        student(**batch), F.cross_entropy(logits[targets], labels[targets], reduction="sum")
    )


def test_objectives_need_their_targets():
    batch = _padded(_sequences()) | {"targets": None}
    with pytest.raises(AssertionError, match="targets"):
        StudentLoss(tiny_model("llama"))(**batch, objective=LogProbs(T))


def test_a_policy_step_leaves_frozen_parts_alone():
    student = StudentLoss(tiny_model("llama"), chunk_tokens=5)
    student.model.lm_head.weight.requires_grad_(False)
    frozen = copy.deepcopy(student.model.lm_head.weight)
    loss, _ = student(**_padded(_sequences()), objective=_policy(torch.full((NUM_TOKENS,), -3.0)))
    loss.backward()
    assert student.model.lm_head.weight.grad is None and torch.equal(student.model.lm_head.weight, frozen)
    assert student.model.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0
