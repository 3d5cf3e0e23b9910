"""Dealing answers over ranks and micro-batches, and laying them out for a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainway.data.batch import IGNORE_INDEX
from trainway.gad.sequences import Exchange, deal, lay_out


def exchange(prompt: list[int], response: list[int]) -> Exchange:
    return Exchange(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))


THREE = [exchange([11, 12], [13, 14]), exchange([21], [22]), exchange([31, 32, 33], [34, 35, 36])]


@given(
    lengths=st.lists(st.integers(1, 400), max_size=60),
    budget=st.integers(50, 1000),
    world_size=st.integers(1, 5),
)
def test_every_answer_is_dealt_once_within_the_budget(
    lengths: list[int], budget: int, world_size: int
) -> None:
    ranks = deal(lengths, budget, world_size)
    assert len(ranks) == world_size
    assert len({len(parts) for parts in ranks}) == 1  # a sharded engine waits for every rank
    dealt = [index for parts in ranks for members in parts for index in members]
    assert sorted(dealt) == list(range(len(lengths)))
    for parts in ranks:
        for members in parts:
            assert len(members) <= 1 or sum(lengths[index] for index in members) <= budget


def test_ranks_get_about_as_many_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 3584, 2304).tolist()  # 256 prompts, 8 answers and the teacher's
    ranks = deal(lengths, 12288, 8)
    loads = [sum(lengths[index] for members in parts for index in members) for parts in ranks]
    assert max(loads) < 1.001 * min(loads)
    assert len(ranks[0]) <= 1.1 * sum(lengths) / (8 * 12288)


def test_a_longer_answer_than_the_budget_goes_alone() -> None:
    assert deal([500, 10, 10], 100, 1) == [[[0], [1, 2]]]


def test_a_rank_may_have_nothing() -> None:
    assert deal([7], 100, 3) == [[[0]], [[]], [[]]]


def test_packed() -> None:
    part = lay_out(THREE, [0, 2], pad_id=0, packed=True)
    assert part.batch.input_ids.tolist() == [[11, 12, 13, 14, 31, 32, 33, 34, 35, 36]]
    assert part.batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    assert part.batch.boundaries == (0, 4, 10)
    x = IGNORE_INDEX
    assert part.batch.labels.tolist() == [[x, 13, 14, x, x, x, 34, 35, 36, x]]
    assert part.batch.targets is not None
    assert part.batch.targets.tolist() == [1, 2, 6, 7, 8]
    assert (part.batch.num_targets, part.batch.num_tokens) == (5, 10)
    assert part.last.tolist() == [3, 9]
    assert part.members == (0, 2)
    assert part.response_lengths == (2, 3)


def test_padded() -> None:
    part = lay_out(THREE, [1, 2], pad_id=9, packed=False)
    assert part.batch.input_ids.tolist() == [[21, 22, 9, 9, 9, 9, 9, 9], [31, 32, 33, 34, 35, 36, 9, 9]]
    assert part.batch.position_ids.tolist() == [list(range(8))] * 2
    assert part.batch.boundaries is None
    assert part.batch.targets is not None
    assert part.batch.targets.tolist() == [0, 10, 11, 12]
    assert part.last.tolist() == [1, 13]


@pytest.mark.parametrize("packed", [True, False])
def test_filling_has_no_targets(packed: bool) -> None:
    part = lay_out(THREE, [], pad_id=0, packed=packed)
    assert part.batch.input_ids.shape == (1, 8)
    assert part.batch.num_targets == part.batch.num_tokens == 0
    assert part.batch.targets is not None
    assert part.batch.targets.shape == part.last.shape == (0,)
    assert part.batch.boundaries == ((0, 8) if packed else None)


def test_the_pad_token_may_end_an_answer() -> None:
    """Where an answer ends is known by its length: a padding token that is also its last one changes nothing."""
    ends = [exchange([5], [6, 0]), exchange([5, 5], [6, 6, 0])]
    part = lay_out(ends, [0, 1], pad_id=0, packed=False)
    assert part.last.tolist() == [2, 12]
    assert part.batch.labels.flatten()[part.batch.targets].tolist() == [6, 0, 6, 6, 0]
