"""Packing against the plain algorithm: the same rows as best fit decreasing, no row too long, no document lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainway.data.packing import by_length, efficiency, pack


def rows_of(lengths: list[int], seq_len: int) -> list[list[int]]:
    """The lengths of each row's documents."""
    packed = pack(np.array(lengths), seq_len)
    ordered = np.array(lengths)[by_length(np.array(lengths))]
    return [ordered[packed.row(row)].tolist() for row in range(packed.num_rows)]


def best_fit_decreasing(lengths: list[int], seq_len: int) -> list[list[int]]:
    """One document at a time, as the rule says it."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= seq_len]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def test_small_cases() -> None:
    assert rows_of([8], 8) == [[8]]
    assert rows_of([9, 1, 5, 5], 10) == [[9, 1], [5, 5]]
    # 6 and 5 open rows; 4 goes to the one it fills up; then 3 beside 5; 2 where exactly 2 are left
    assert sorted(rows_of([2, 3, 4, 5, 6], 10)) == [[5, 3, 2], [6, 4]]
    assert sorted(rows_of([1] * 7, 3)) == [[1], [1, 1, 1], [1, 1, 1]]
    assert sorted(rows_of([7, 7, 3, 3, 3], 10)) == [[3], [7, 3], [7, 3]]
    assert pack(np.array([], dtype=np.int64), 10).num_rows == 0


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80), extra=st.integers(0, 40))
def test_the_rows_are_those_of_best_fit_decreasing(lengths: list[int], extra: int) -> None:
    seq_len = max(lengths) + extra
    packed = pack(np.array(lengths), seq_len)
    assert sorted(packed.slots.tolist()) == list(range(len(lengths)))  # each document once
    rows = rows_of(lengths, seq_len)
    assert all(row and sum(row) <= seq_len for row in rows)
    expected = best_fit_decreasing(lengths, seq_len)
    # rows equally full are interchangeable: which of them gets the next document is free
    assert sorted(map(sum, rows)) == sorted(map(sum, expected))


def test_the_rows_depend_on_the_lengths_alone() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 100, 500)
    first, second = pack(lengths, 128), pack(rng.permutation(lengths), 128)
    assert np.array_equal(first.slots, second.slots)
    assert np.array_equal(first.row_starts, second.row_starts)
    filled = efficiency(int(lengths.sum()), first.num_rows, 128)
    assert first.num_rows == 194
    assert filled == pytest.approx(lengths.sum() / (194 * 128))
    assert efficiency(0, 0, 128) == 0


def test_slots_go_from_long_to_short_and_equal_lengths_by_priority() -> None:
    lengths = np.array([3, 5, 3, 9, 5, 3])
    assert by_length(lengths).tolist() == [3, 1, 4, 0, 2, 5]
    assert by_length(lengths, np.array([5, 4, 3, 2, 1, 0])).tolist() == [3, 4, 1, 5, 2, 0]
    assert by_length(np.array([], dtype=np.int64)).tolist() == []


def test_a_document_of_no_fitting_length_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="of no fitting length"):
        pack(np.array([4, 11]), 10)
    with pytest.raises(AssertionError, match="of no fitting length"):
        pack(np.array([4, 0]), 10)
