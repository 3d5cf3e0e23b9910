"""The chunked cross-entropy and log-probabilities against torch's own: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainway.losses import IGNORE_INDEX, LogitForm, linear_cross_entropy, linear_log_probs


def _case(rows=37, width=16, vocab=53, dtype=torch.float32, ignored=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    if ignored:
        labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("ignored", [False, True])
def test_equals_cross_entropy_with_gradients(chunk, ignored):
    hidden, weight, labels = _case(ignored=ignored)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(*ours, labels, chunk)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    (loss / 7).backward()
    (expected / 7).backward()
    assert loss.dtype == torch.float32 and loss.ndim == 0
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    hidden, weight, labels = _case(rows=7, width=4, vocab=6, dtype=torch.float64)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 3), inputs)


def test_autocast_matches_half_precision_gemms():
    hidden, weight, labels = _case(rows=64, width=64, vocab=200)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*ours, labels, 16)
        logits = F.linear(*theirs)
    expected = F.cross_entropy(logits.float(), labels, reduction="sum")
    loss.backward()
    expected.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm()


def test_frozen_head_and_frozen_hidden():
    hidden, weight, labels = _case()
    trained = hidden.clone().requires_grad_()
    linear_cross_entropy(trained, weight, labels, 8).backward()
    assert trained.grad is not None and weight.grad is None
    head = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, head, labels, 8).backward()
    assert head.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(trained, head, labels, 8).requires_grad


def test_no_targets_is_zero_with_zero_gradients():
    hidden, weight, labels = _case()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 8)
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


def test_backward_leaves_the_gradients_usable_twice():
    hidden, weight, labels = _case()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, 8)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, hidden)
    torch.testing.assert_close(second, 2 * first)


def test_large_logits_stay_finite():
    hidden, weight, labels = torch.full((2, 1), 1e3), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 8), torch.tensor(2e3))


def _plain_losses(hidden, weight, labels, z_loss):
    """Cross-entropy and z-loss, with logits whole and gradients by autograd."""
    logits = F.linear(hidden, weight)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    log_z = logits.logsumexp(-1)[labels != IGNORE_INDEX]
    nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    return torch.stack([nll, z_loss * log_z.square().sum()])


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_z_loss_equals_autograd(chunk, ignored, dtype, tolerance):
    hidden, weight, labels = _case(dtype=dtype, ignored=ignored)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    sums, expected = linear_cross_entropy(*ours, labels, chunk, 0.05), _plain_losses(*theirs, labels, 0.05)
    (sums.sum() / 7).backward()
    (expected.sum() / 7).backward()
    assert sums.dtype == dtype and sums.shape == (2,)
    torch.testing.assert_close(sums, expected, rtol=tolerance, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


def test_z_loss_gradcheck():
    hidden, weight, labels = _case(rows=7, width=4, vocab=6, dtype=torch.float64)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 3, 0.3).sum(), inputs)


def test_z_loss_under_autocast():
    hidden, weight, labels = _case(rows=64, width=64, vocab=200)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_cross_entropy(*ours, labels, 16, 0.05)
        expected = _plain_losses(*theirs, labels, 0.05)
    sums.sum().backward()
    expected.sum().backward()
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm()


def test_z_loss_leaves_the_cross_entropy_as_it_was():
    hidden, weight, labels = _case()
    alone = linear_cross_entropy(hidden, weight, labels, 8)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, 8, 1e-4)[0], alone)


def test_z_loss_of_large_logits():
    # logits 1000 and -1000: the normaliser is 1000 in either row, whichever logit is the label's
    hidden, weight = torch.full((2, 1), 1e3), torch.tensor([[1.0], [-1.0]])
    sums = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), 8, 1e-2)
    torch.testing.assert_close(sums, torch.tensor([2e3, 2e4]))


def test_z_loss_refuses_a_gradient_of_one_part():
    hidden, weight, labels = _case()
    with pytest.raises(AssertionError, match="sum of both"):
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, 8, 0.1)[0].backward()


def test_z_loss_without_targets_is_zero():
    hidden, weight, labels = _case()
    hidden.requires_grad_()
    sums = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 8, 0.1)
    sums.sum().backward()
    assert sums.tolist() == [0.0, 0.0] and not hidden.grad.any()


FORMS = [LogitForm(scale=0.3), LogitForm(softcap=2.0), LogitForm(scale=1.7, softcap=0.8), LogitForm()]


def _formed(hidden, weight, bias, form):
    logits = (hidden @ weight.T + bias) * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_scales_softcaps_and_biases_equal_autograd(form, z_loss, dtype, tolerance):
    hidden, weight, labels = _case(dtype=dtype)
    bias = torch.randn(len(weight), dtype=dtype, generator=torch.Generator().manual_seed(1))
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight, bias)] for _ in range(2))
    sums = linear_cross_entropy(*ours[:2], labels, 8, z_loss, bias=ours[2], form=form)
    logits = _formed(*theirs, form)
    nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    z = z_loss * (logits.logsumexp(-1)[labels != IGNORE_INDEX] ** 2).sum()
    (sums.sum() / 7).backward()
    ((nll + z) / 7).backward()
    torch.testing.assert_close(sums.sum(), nll + z, rtol=tolerance, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert b.grad.norm() > 1e-2
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_forms_gradcheck(form):
    hidden, weight, labels = _case(rows=7, width=4, vocab=6, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, 3, 0.3, bias=bias, form=form).sum()

    assert torch.autograd.gradcheck(loss, inputs)


def test_forms_under_autocast():
    hidden, weight, labels = _case(rows=64, width=64, vocab=200)
    bias = torch.randn(200, generator=torch.Generator().manual_seed(1))
    form = LogitForm(scale=0.5, softcap=3.0)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight, bias)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*ours[:2], labels, 16, bias=ours[2], form=form)
    expected = F.cross_entropy(_formed(*theirs, form), labels, reduction="sum", ignore_index=IGNORE_INDEX)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 3e-2 * b.grad.norm()


def _plain_log_probs(hidden, weight, bias, labels, temperature, form=FORMS[-1]):
    """Log-probabilities and entropies, with logits whole and gradients by autograd."""
    logits = _formed(hidden, weight, bias, form)
    log_probs = torch.log_softmax(
        logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1
    )
    picked = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    ignored = labels == IGNORE_INDEX
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def _biased_case(**shape):
    hidden, weight, labels = _case(**shape)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(len(weight), dtype=weight.dtype, generator=generator)
    pull = torch.randn(len(hidden), dtype=weight.dtype, generator=generator)
    return hidden, weight, bias, labels, pull


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_log_probs_equal_autograd(chunk, temperature, form, dtype, tolerance):
    hidden, weight, bias, labels, pull = _biased_case(dtype=dtype)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden / 4, weight, bias)] for _ in range(2))
    found, entropy = linear_log_probs(
        *ours[:2], labels, chunk, temperature=temperature, bias=ours[2], form=form
    )
    expected, expected_entropy = _plain_log_probs(*theirs, labels, temperature, form)
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    assert found.dtype == entropy.dtype == dtype and not entropy.requires_grad
    assert not found[::5].any() and not entropy[::5].any()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=tolerance, atol=4 * tolerance)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).norm() < tolerance * b.grad.norm()


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_gradcheck(form):
    hidden, weight, bias, labels, _ = _biased_case(rows=7, width=4, vocab=6, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def log_probs(hidden, weight, bias):
        return linear_log_probs(hidden, weight, labels, 3, temperature=0.7, bias=bias, form=form)[0]

    assert torch.autograd.gradcheck(log_probs, inputs)


def test_log_probs_sum_to_the_cross_entropy_with_its_gradients():
    hidden, weight, labels = _case()
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss, expected = -linear_log_probs(*ours, labels, 8)[0].sum(), linear_cross_entropy(*theirs, labels, 8)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_log_probs_under_autocast():
    """The GEMMs run in half precision, forward and backward; temperature and statistics are fp32."""
    hidden, weight, _, labels, pull = _biased_case(rows=64, width=64, vocab=200, ignored=False)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found, entropy = linear_log_probs(*ours, labels, 16, temperature=0.7)
        logits = F.linear(*theirs)
    assert logits.dtype == torch.bfloat16 and found.dtype == entropy.dtype == torch.float32
    log_probs = torch.log_softmax(logits.float() / 0.7, -1)
    expected = log_probs.gather(1, labels[:, None])[:, 0]
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1).detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 1e-2 * b.grad.norm()


def test_log_probs_of_frozen_inputs():
    hidden, weight, bias, labels, _ = _biased_case()
    for trained in range(3):
        inputs = [x.clone().requires_grad_(i == trained) for i, x in enumerate((hidden, weight, bias))]
        linear_log_probs(*inputs[:2], labels, 8, bias=inputs[2])[0].sum().backward()
        assert [x.grad is not None for x in inputs] == [i == trained for i in range(3)]
    with torch.no_grad():
        assert not linear_log_probs(inputs[0], weight, labels, 8, bias=inputs[2])[0].requires_grad


def test_a_frozen_head_has_no_gradient_made_of_its_log_probs():
    hidden, weight, labels = _case(rows=8, width=4, vocab=1000)
    log_probs, _ = linear_log_probs(hidden.requires_grad_(), weight, labels, 2)
    with _Sizes() as sizes:
        log_probs.sum().backward()
    assert (1000, 4) not in sizes.shapes and (8, 4) in sizes.shapes


def test_no_log_probs_are_empty_with_zero_gradients():
    hidden, weight, bias, labels, _ = _biased_case()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    log_probs, entropy = linear_log_probs(hidden[:0], weight, labels[:0], 8, bias=bias)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


def test_log_probs_of_large_logits():
    # logits 1000 and -1000: of the likelier the log-probability is 0, and there is no doubt which it will be
    hidden, weight = torch.full((2, 1), 1e3), torch.tensor([[1.0], [-1.0]])
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([0, 1]), 8, temperature=0.5)
    assert log_probs.tolist() == [0.0, -4000.0] and entropy.tolist() == [0.0, 0.0]


class _Sizes(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("form", [FORMS[2], FORMS[-1]])
def test_at_most_a_chunk_of_logits_is_alive(form):
    hidden, weight, labels = _case(rows=64, width=4, vocab=1000, ignored=False)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    with _Sizes() as sizes:
        linear_log_probs(*inputs, labels, 8, temperature=0.7, form=form)[0].sum().backward()
        linear_cross_entropy(*inputs, labels, 8, form=form).backward()
    assert max(shape[0] for shape in sizes.shapes if shape[1:] == (1000,)) == 8
    with _Sizes() as sizes:
        _plain_log_probs(*inputs, torch.zeros(1000), labels, 0.7, form)
    assert (64, 1000) in sizes.shapes


def test_an_impossible_token_adds_nothing_to_the_entropy() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    bias = torch.zeros(11)
    bias[7] = -torch.inf
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = linear_log_probs(hidden, weight, labels, 2, bias=bias)
    possible = [token for token in range(11) if token != 7]
    expected = linear_log_probs(hidden, weight[possible], labels, 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
