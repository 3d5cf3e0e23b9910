"""Attention within segments against its definition: windows, softcaps, sinks, other widths; values and gradients."""

from itertools import pairwise

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from trainway.models.segments import Segments, attend_plainly, attend_segments

BOUNDARIES = (0, 9, 18, 24, 25, 48)  # two rows of 24; a run of two equal segments, and one of a single token


def _draw(num_heads, num_kv_heads, width, value_width, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    # the layout of the projections: [B, T, H, D], of which the model hands on a view
    q, k = draw(2, 24, num_heads, width), draw(2, 24, num_kv_heads, width)
    return q, k, draw(2, 24, num_kv_heads, value_width), draw(num_heads)


class _Layer:
    """What transformers' eager attention of gpt-oss reads of its module."""

    training = False

    def __init__(self, groups, sinks):
        self.num_key_value_groups, self.sinks = groups, sinks


def _expected(q, k, v, sinks, scale, window, softcap):
    """Segment by segment: gpt-oss's own eager attention, or one written out where it has sinks or not."""
    parts = []
    for start, stop in pairwise(BOUNDARIES):
        a, b, c = (x.flatten(0, 1)[start:stop].transpose(0, 1)[None] for x in (q, k, v))  # [1, H, L, D]
        length = stop - start
        at = torch.arange(length, device=q.device)
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or length))
        mask = torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        groups = a.shape[1] // b.shape[1]
        if sinks is not None:
            out = eager_attention_forward(_Layer(groups, sinks), a, b, c, mask[None, None], scale)[0]
        else:
            b, c = b.repeat_interleave(groups, 1), c.repeat_interleave(groups, 1)
            scores = a @ b.mT * scale
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            out = ((scores + mask).softmax(-1) @ c).transpose(1, 2)
        parts.append(out[0])
    return torch.cat(parts).unflatten(0, (2, 24))


CASES = {
    "plain": {},
    "window": {"window": 4},
    "sinks-window-of-one": {"sinks": True, "window": 1},
    "wide-window": {"window": 50},
    "softcap": {"softcap": 1.5},
    "softcap-window": {"softcap": 1.5, "window": 4},
    "sinks": {"sinks": True},
    "sinks-window": {"sinks": True, "window": 4},
    "narrow-values": {"value_width": 4},
    "narrow-values-window": {"value_width": 4, "window": 4},
    "narrow-values-sinks": {"value_width": 4, "sinks": True},
    "wide-values": {"value_width": 16},
    "wide-values-sinks-window": {"value_width": 16, "sinks": True, "window": 4},
}


def _compare(case, kv_heads, dtype, tolerance, device="cpu"):
    """Values and gradients of q, k, v and sinks, in `dtype` against fp64."""
    window, softcap = case.get("window"), case.get("softcap")
    inputs = _draw(4, kv_heads, 8, case.get("value_width", 8), dtype, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scale = 0.6
    q, k, v, sinks = inputs
    found = attend_segments(
        *(x.transpose(1, 2) for x in (q, k, v)), Segments(BOUNDARIES), scale, window, softcap,
        sinks if "sinks" in case else None,
    )  # fmt: skip
    expected = _expected(*exact[:3], exact[3] if "sinks" in case else None, scale, window, softcap)
    assert found.shape == expected.shape and found.dtype == dtype
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    (found * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(found.detach(), expected.detach())] + [
        (a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)
    ]
    for number, (a, b) in enumerate(pairs):
        if b is None:
            assert a is None and "sinks" not in case
            continue
        assert b.norm() > 0.1, number
        assert (a.double() - b).norm() <= tolerance * b.norm(), number


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, kv_heads):
    _compare(CASES[name], kv_heads, torch.float64, 1e-10)
    _compare(CASES[name], kv_heads, torch.float32, 2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_gradcheck(window):
    q, k, v, sinks = _draw(2, 1, 4, 4, torch.float64)
    segments = Segments(BOUNDARIES)

    def attend(q, k, v, sinks):
        return attend_segments(*(x.transpose(1, 2) for x in (q, k, v)), segments, None, window, None, sinks)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks), fast_mode=True)


def test_a_large_sink_swallows_attention_and_a_small_one_changes_nothing():
    q, k, v, sinks = _draw(4, 2, 8, 8, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    segments = Segments(BOUNDARIES)
    plain = attend_segments(q, k, v, segments, None)
    small = attend_segments(q, k, v, segments, None, sinks=torch.full_like(sinks, -80.0))
    large = attend_segments(q, k, v, segments, None, sinks=torch.full_like(sinks, 80.0))
    torch.testing.assert_close(small, plain)
    assert large.abs().max() < 1e-30 and large.isfinite().all()


def test_autocast_casts_as_sdpa_does():
    q, k, v, _ = _draw(4, 2, 8, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_segments(*(x.transpose(1, 2) for x in (q, k, v.bfloat16())), Segments(BOUNDARIES), None)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("additive", [False, True])
def test_generation_by_definition_takes_both_kinds_of_masks(additive):
    q, k, v, sinks = (x.transpose(1, 2) if x.ndim == 4 else x for x in _draw(4, 2, 8, 8, torch.float64))
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    mask = torch.zeros(24, 24, dtype=torch.float64).masked_fill(~seen, -torch.inf) if additive else seen
    expected = attend_segments(q, k, v, Segments((0, 24, 48)), None, sinks=sinks)
    torch.testing.assert_close(attend_plainly(q, k, v, mask, None, sinks=sinks).transpose(1, 2), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_on_a_gpu(name, kv_heads):
    _compare(CASES[name], kv_heads, torch.float32, 1e-5, "cuda")
    _compare(CASES[name], kv_heads, torch.bfloat16, 2e-2, "cuda")
