"""The discriminator's and the student's losses: closed forms, exact expectations, sums that come apart."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainway.gad.losses import (
    LOG_RATIO_LIMIT,
    PolicyStats,
    bradley_terry,
    group_advantages,
    policy_loss,
    pool_stats,
)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("answers", [1, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_bradley_terry_gradient_is_autograds(answers, dtype, tolerance):
    teacher = (3 * _random(5)).to(dtype).requires_grad_()
    student = (3 * _random(5, answers, seed=1)).to(dtype).requires_grad_()
    expected = F.softplus(student - teacher[:, None]).mean()
    expected.backward()
    for scores in ((teacher, student), (teacher.detach(), student.detach())):
        found = bradley_terry(*scores)
        torch.testing.assert_close(found.loss, expected, rtol=tolerance, atol=0, check_dtype=True)
        torch.testing.assert_close(found.d_teacher, teacher.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.d_student, student.grad, rtol=tolerance, atol=tolerance)
        assert not found.d_teacher.requires_grad and not found.d_student.requires_grad
    total = found.d_teacher.sum() + found.d_student.sum()  # the loss knows differences alone
    assert abs(total.item()) < tolerance


def test_bradley_terry_by_hand():
    teacher, student = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    found = bradley_terry(teacher, student)
    sigmoid = 1 / (1 + math.exp(2))
    assert found.loss.item() == pytest.approx(
        (math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(2)) + math.log(2)) / 4
    )
    torch.testing.assert_close(found.d_student, torch.tensor([[0.5, sigmoid], [1 - sigmoid, 0.5]]) / 4)
    torch.testing.assert_close(found.d_teacher, -found.d_student.sum(1))


@pytest.mark.parametrize("score", [0.0, 12.4, -1e4])
def test_equal_scores_cost_ln_2(score):
    found = bradley_terry(torch.full((3,), score), torch.full((3, 4), score))
    assert found.loss.item() == pytest.approx(math.log(2), rel=1e-7)
    assert found.d_student.unique().tolist() == [pytest.approx(0.5 / 12)]


def test_scores_far_apart_stay_finite():
    found = bradley_terry(torch.tensor([500.0, -500.0]), torch.tensor([[-500.0], [500.0]]))
    assert found.loss.item() == 500.0 and found.d_teacher.tolist() == [0.0, -0.5]


def test_half_precision_scores_are_taken_to_fp32():
    # near 12 bf16 has steps of 1/16: the scores are read wrongly before they come here, but not once more
    teacher, student = torch.tensor([12.0625]).bfloat16(), torch.tensor([[12.0, 12.125]]).bfloat16()
    found = bradley_terry(teacher, student)
    assert (
        found.loss.dtype == torch.float32
        and found.loss.item() == bradley_terry(teacher.float(), student.float()).loss
    )
    assert group_advantages(student).dtype == torch.float32


def test_advantages_by_hand():
    found = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]))
    torch.testing.assert_close(
        found, torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0]]) / torch.tensor([[1.0], [3**0.5]])
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_advantages_sum_to_zero_and_have_unit_variance(dtype, tolerance):
    found = group_advantages((12 + 0.05 * _random(64, 8)).to(dtype))
    assert found.sum(1).abs().max() < tolerance * 200
    assert (found.std(1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("a", "b"), [(1.0, 40.0), (7.0, 0.0), (0.2, -3.0)])
def test_advantages_know_neither_scale_nor_offset(a, b):
    rewards = _random(64, 8)
    torch.testing.assert_close(
        group_advantages(a * rewards + b), group_advantages(rewards), rtol=3e-5, atol=1e-9
    )
    torch.testing.assert_close(
        group_advantages(a * rewards + b, eps=0.0), group_advantages(rewards, eps=0.0), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("answers", [2, 3, 7, 8, 13, 64])
def test_equal_rewards_have_no_advantage(answers, dtype):
    rewards = (10 * _random(200, 1)).to(dtype).expand(200, answers).contiguous()
    rewards[0] = 0.1
    assert not group_advantages(rewards).any()
    rewards[1:, -1] += 0.01
    assert not group_advantages(rewards)[0].any() and group_advantages(rewards)[1:].all()


POLICY = {"clip_range": 0.2, "kl_coef": 0.0}


def test_on_policy_gradient_is_minus_the_advantage():
    logp, advantages = -_random(11).abs(), _random(11, seed=1)
    for old in (None, logp.clone()):
        leaf = logp.clone().requires_grad_()
        loss, stats = policy_loss(leaf, advantages, old, None, **POLICY)
        loss.backward()
        assert torch.equal(leaf.grad, -advantages) and loss.ndim == 0
        torch.testing.assert_close(loss, -advantages.sum())
        assert stats.clipped.item() == 0 and stats.ratio.item() == 11 and stats.max_ratio.item() == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # likelier already: held at 1.2
        (0.5, 2.0, -1.0, -1.0, 0),  # less likely, but good: all of its gradient
        (0.9, -2.0, 1.8, 1.8, 0),
        (0.5, -2.0, 1.6, 0.0, 1),  # less likely already: held at 0.8
        (1.5, -2.0, 3.0, 3.0, 0),  # likelier, but bad: all of its gradient
        (4.0, -2.0, 6.0, 0.0, 1),  # held by the dual clip at 3
        (2.9, -2.0, 5.8, 5.8, 0),
        (4.0, 2.0, -2.4, 0.0, 1),  # of a good one the dual clip knows nothing
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_both_signs_of_the_clip(ratio, advantage, term, slope, clipped):
    logp = torch.tensor([math.log(ratio) - 3], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(
        logp, torch.tensor([advantage]).double(), torch.tensor([-3.0]).double(), None, dual_clip=3.0, **POLICY
    )
    loss.backward()
    assert loss.item() == pytest.approx(term) and logp.grad.item() == pytest.approx(slope)
    assert stats.clipped.item() == clipped and stats.policy.item() == loss.item()
    assert stats.max_ratio.item() == stats.ratio.item() == pytest.approx(ratio)


def test_without_a_dual_clip_a_bad_token_has_no_bound():
    logp = torch.tensor([math.log(40)], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(logp, -torch.ones(1).double(), torch.zeros(1).double(), None, **POLICY)
    loss.backward()
    assert loss.item() == pytest.approx(40) and logp.grad.item() == pytest.approx(40)
    assert stats.clipped.item() == 0


@pytest.mark.parametrize("gap", [0.01, 0.3, 2.0])
def test_k3_is_the_divergence_on_average(gap):
    """The sum over a whole vocabulary of p k3 is KL(p, reference); so is the gradient of its expectation."""
    logits, other = _random(10), _random(10, seed=1)
    logp = torch.log_softmax(logits, 0)
    ref = torch.log_softmax(logits + gap * other, 0)
    expected = (logp.exp() * (logp - ref)).sum()
    values = torch.stack(
        [
            policy_loss(logp[i, None], torch.zeros(1), None, ref[i, None], clip_range=0.2, kl_coef=1.0)[0]
            for i in range(10)
        ]
    )
    assert values.min() >= 0 and expected > 1e-6
    torch.testing.assert_close((logp.exp() * values).sum(), expected, rtol=1e-9, atol=0)
    loss, stats = policy_loss(logp, torch.zeros(10), None, ref, clip_range=0.2, kl_coef=0.25)
    torch.testing.assert_close(loss, 0.25 * values.sum())
    torch.testing.assert_close(stats.kl, values.sum())


def test_k3_of_a_small_divergence_keeps_its_digits_in_fp32():
    log_ratio = torch.tensor([1e-3, -1e-3])
    _, stats = policy_loss(
        -1 - log_ratio, torch.zeros(2), None, torch.full((2,), -1.0), clip_range=0.2, kl_coef=1.0
    )
    exact = (torch.expm1((-1.0 - (-1 - log_ratio)).double()) - (-1.0 - (-1 - log_ratio)).double()).sum()
    assert stats.kl.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [-1e3, -60.0, 60.0, 1e3])
def test_log_ratios_past_the_limit_stay_finite_without_gradient(advantage, gap):
    logp = torch.tensor([-1.0 - 2e3 + gap], requires_grad=True)
    old = torch.tensor([-1.0 - 2e3])
    loss, _ = policy_loss(logp, torch.tensor([advantage]), old, old, clip_range=0.2, kl_coef=0.5)
    loss.backward()
    bound = math.exp(LOG_RATIO_LIMIT)
    ratio = bound if gap > 0 else 0.0
    clipped = min(max(ratio, 0.8), 1.2)
    kl = 0.5 * (gap - 1 if gap > 0 else bound - LOG_RATIO_LIMIT - 1)
    assert loss.item() == pytest.approx(max(-ratio * advantage, -clipped * advantage) + kl, rel=1e-5)
    assert logp.grad.item() == pytest.approx(0.5 if gap > 0 else 0.0, abs=1e-12)


def test_of_no_tokens_everything_is_zero():
    empty = torch.empty(0, requires_grad=True)
    loss, stats = policy_loss(
        empty, torch.empty(0), None, torch.empty(0), clip_range=0.2, kl_coef=0.1, entropy=torch.empty(0)
    )
    loss.backward()
    assert loss.item() == 0.0 and [value.item() for value in stats] == [0.0] * 6 and empty.grad.shape == (0,)


def test_a_kl_term_needs_a_reference():
    with pytest.raises(AssertionError, match="reference"):
        policy_loss(torch.zeros(1), torch.zeros(1), None, None, clip_range=0.2, kl_coef=0.1)


def test_a_reference_without_a_coefficient_is_measured_alone():
    logp = (-_random(5).abs()).requires_grad_()
    loss, stats = policy_loss(logp, torch.ones(5), None, logp.detach() - 0.3, **POLICY)
    loss.backward()
    assert torch.equal(logp.grad, -torch.ones(5).double()) and stats.kl.item() > 0.1


def test_loss_and_statistics_of_parts_make_up_those_of_the_whole():
    logp, advantages, old, ref, entropy = (-_random(30, seed=seed).abs() for seed in range(5))
    advantages = _random(30, seed=1)
    how = {"clip_range": 0.2, "kl_coef": 0.1, "dual_clip": 3.0}
    whole, expected = policy_loss(logp, advantages, old, ref, entropy=entropy, **how)
    parts = [
        policy_loss(*(x[part] for x in (logp, advantages, old, ref)), entropy=entropy[part], **how)
        for part in (slice(0, 1), slice(1, 19), slice(19, 19), slice(19, 30))
    ]
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole)
    pooled = pool_stats(torch.stack([torch.stack(stats) for _, stats in parts]))
    assert isinstance(pooled, PolicyStats) and 0 < pooled.clipped < 30 and pooled.max_ratio > 1.2
    torch.testing.assert_close(torch.stack(pooled), torch.stack(expected))
    torch.testing.assert_close(pooled.policy + 0.1 * pooled.kl, whole)
    torch.testing.assert_close(pooled.entropy, entropy.sum())
