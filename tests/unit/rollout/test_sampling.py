"""Tokens follow the softmax, by numbers that depend on an answer's seed and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainway.rollout.sampling import draw, uniforms


def outputs(seed: int, count: int) -> list[int]:
    numbers = uniforms(np.full(count, seed, np.uint64), np.arange(count))
    return [int(number * 2**53) for number in numbers]


def test_numbers_are_those_of_splitmix64() -> None:
    """The first outputs for seed 1234567, as its other implementations give them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert outputs(1234567, 4) == [number >> 11 for number in published]
    assert outputs(2**64 - 1, 2) != outputs(2**64 - 2, 2)


def test_numbers_are_uniform() -> None:
    numbers = uniforms(np.arange(400, dtype=np.uint64).repeat(500), np.tile(np.arange(500), 400))
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert 60 < chi_square < 150  # 99 degrees of freedom: 99 ± 14
    pairs = numbers.reshape(400, 500)
    assert abs(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1]) < 0.2
    assert abs(np.corrcoef(pairs[0], pairs[1])[0, 1]) < 0.2


@pytest.mark.parametrize("vocabulary", [5, 128, 1000])
def test_a_token_is_the_first_whose_share_is_above(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, vocabulary, generator=generator)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    shares = (logits.double() / 0.7).softmax(-1).cumsum(-1).tolist()
    expected = [
        int(np.searchsorted(row, u, side="right")) for row, u in zip(shares, uniform.tolist(), strict=True)
    ]
    assert draw(logits, uniform, 0.7, 1.0).tolist() == expected


def test_top_p_keeps_the_smallest_set_of_likeliest_tokens() -> None:
    probs = torch.tensor([[0.1, 0.3, 0.05, 0.35, 0.2]])
    grid = torch.arange(1000, dtype=torch.float64) / 1000

    def drawn(top_p: float) -> list[int]:
        tokens = draw(probs.log().expand(1000, -1), grid, 1.0, top_p)
        return torch.bincount(tokens, minlength=5).tolist()

    assert drawn(0.34) == drawn(0.01) == [0, 0, 0, 1000, 0]
    assert drawn(0.36)[0::2] == drawn(0.64)[0::2] == [0, 0, 0]
    assert drawn(0.64)[1] == pytest.approx(1000 * 0.3 / 0.65, abs=1)
    assert [count > 0 for count in drawn(0.84)] == [False, True, False, True, True]
    assert drawn(1.0) == pytest.approx([100, 300, 50, 350, 200], abs=1)


def test_top_p_of_a_large_vocabulary() -> None:
    """The share is full among the first thousand tokens in some rows, and long after in others."""
    generator = torch.Generator().manual_seed(3)
    peaked, flat = 8 * torch.randn(20, 5000, generator=generator), torch.randn(20, 5000, generator=generator)
    uniform = torch.rand(20, generator=generator, dtype=torch.float64)
    alone = [draw(logits, uniform, 1.0, 0.9) for logits in (peaked, flat)]
    assert torch.equal(draw(torch.cat([peaked, flat]), uniform.repeat(2), 1.0, 0.9), torch.cat(alone))
    for logits, tokens in zip((peaked, flat), alone, strict=True):
        probs = logits.softmax(-1)
        falling, order = probs.sort(-1, descending=True)
        ranks = order.argsort(-1).gather(-1, tokens[:, None])[:, 0]
        inside = (falling.cumsum(-1) < 0.9).sum(-1)
        assert (ranks <= inside).all()
        kept = torch.where(order.argsort(-1) <= inside[:, None], probs, 0.0).double()
        shares = (kept / kept.sum(-1, keepdim=True)).cumsum(-1)
        assert torch.equal(tokens, torch.searchsorted(shares, uniform[:, None], right=True)[:, 0])


def test_of_equally_likely_tokens_top_p_takes_all() -> None:
    tokens = draw(torch.zeros(100, 4), torch.arange(100, dtype=torch.float64) / 100, 1.0, 0.5)
    assert torch.bincount(tokens).tolist() == [25, 25, 25, 25]


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(64, 777, generator=generator)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    for top_p in (1.0, 0.9):
        together = draw(logits, uniform, 0.8, top_p)
        alone = torch.cat(
            [draw(row[None], u[None], 0.8, top_p) for row, u in zip(logits, uniform, strict=True)]
        )
        assert torch.equal(together, alone)


def test_a_token_without_a_share_is_never_drawn() -> None:
    logits = torch.full((3, 300), -torch.inf)
    logits[:, 140:150] = 0.0
    ends = torch.tensor([0.0, 1 - 2.0**-53, 0.55], dtype=torch.float64)
    assert draw(logits, ends, 1.0, 1.0).tolist() == [140, 149, 145]


def test_temperature_0_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    assert draw(logits, torch.tensor([0.999, 0.999], dtype=torch.float64), 0.0, 0.5).tolist() == [1, 0]
