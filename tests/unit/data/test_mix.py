"""A mix: exact shares at every block, each source in an order of its own, the same for any ranks or resume."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.data.test_loader import same

from trainway.config.schema import SourceConfig
from trainway.data.loader import Loader
from trainway.data.mix import BLOCK_ROWS, Mix, describe_mix, epochs_by_source, plan_mix, repeated_sources
from trainway.data.store import TokenSplit
from trainway.errors import DataError

SEQ_LEN = 8
BASES = (1000, 20_000, 40_000)
"""The tokens of source i are BASES[i], BASES[i] + 1, ...: a row's first token says where it was read."""


def weighted(*weights: float) -> list[SourceConfig]:
    return [SourceConfig(path=f"s{i}", weight=weight) for i, weight in enumerate(weights)]


def in_epochs(*epochs: float | None) -> list[SourceConfig]:
    return [SourceConfig(path=f"s{i}", epochs=passes) for i, passes in enumerate(epochs)]


def stream(base: int, tokens: int, document: int = 5) -> TokenSplit:
    starts = np.array([*range(0, tokens, document), tokens])
    return TokenSplit.from_arrays(np.arange(tokens, dtype=np.uint16) + base, starts, eos_id=1)


def make_loader(
    sources: list[SourceConfig], tokens: tuple[int, ...] = (400, 96, 960), **changes: Any
) -> Loader:
    streams = [stream(base, count) for base, count in zip(BASES, tokens, strict=False)]
    given = {
        "seq_len": SEQ_LEN, "global_batch_size": 16, "micro_batch_size": 2, "seed": 3, "packing": "documents",
        "shuffle": True,
    }  # fmt: skip
    return Loader(streams, mix=plan_mix(sources, tokens, SEQ_LEN), **{**given, **changes})


def rows_read(loader: Loader, steps: range) -> list[tuple[int, int]]:
    """(source, position of the first token) of each row, in the order in which they are trained on."""
    firsts = [
        int(first)
        for step in steps
        for batch in loader.step(step).micro_batches
        for first in batch.input_ids[:, 0]
    ]
    sources = [sum(first >= base for base in BASES) - 1 for first in firsts]
    return [(source, first - BASES[source]) for source, first in zip(sources, firsts, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(1e-4, 100, allow_nan=False), min_size=1, max_size=9),
    seed=st.integers(0, 3),
    block=st.integers(0, 10**6),
)
def test_shares_are_exact_at_every_block(weights: list[float], seed: int, block: int) -> None:
    mix = plan_mix(weighted(*weights), [8 * 10**6] * len(weights), 8)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert mix.shares == tuple(Fraction(str(weight)) / total for weight in weights)
    first = block * BLOCK_ROWS
    before, after = mix.counts(first), mix.counts(first + BLOCK_ROWS)
    assert (sum(before), sum(after)) == (first, first + BLOCK_ROWS)
    for count, share in zip(before, mix.shares, strict=True):
        assert abs(count - first * share) <= math.ceil(math.log2(len(weights))) / 2
    sources, numbers = mix.place(np.arange(first, first + BLOCK_ROWS), seed)
    for index, (start, stop) in enumerate(zip(before, after, strict=True)):
        assert numbers[sources == index].tolist() == list(range(start, stop))


@given(weights=st.lists(st.floats(1e-3, 10), min_size=1, max_size=9), number=st.integers(0, 10**15))
def test_counts_never_fall(weights: list[float], number: int) -> None:
    mix = plan_mix(weighted(*weights), [8] * len(weights), 8)
    pairs = zip(mix.counts(number), mix.counts(number + 1), strict=True)
    assert sorted(after - before for before, after in pairs) == [0] * (len(weights) - 1) + [1]


def test_place_does_not_depend_on_how_the_rows_are_cut() -> None:
    mix = plan_mix(weighted(0.7, 0.2, 0.1), [800, 800, 800], SEQ_LEN)
    rows = np.arange(1500)
    sources, numbers = mix.place(rows, 9)
    for size in (3, 7, 256, 1000):
        pieces = [mix.place(rows[first : first + size], 9) for first in range(0, 1500, size)]
        assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), sources)
        assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), numbers)
    assert not np.array_equal(mix.place(rows, 10)[0], sources)


def test_the_sources_of_a_block_are_mixed_well() -> None:
    mix = plan_mix(weighted(1, 1), [800, 800], SEQ_LEN)
    sources, _ = mix.place(np.arange(256 * 400), 1)
    blocks = sources.reshape(400, 256)
    assert (blocks.sum(1) == 128).all()
    by_place = blocks.mean(0)  # of 400 fair coins: 0.5 +- 0.025
    assert abs(by_place - 0.5).max() < 0.125
    changes = (np.diff(blocks) != 0).mean()
    assert abs(changes - 0.5) < 0.01
    assert len({block.tobytes() for block in blocks}) == 400


def test_pinned() -> None:
    """A changed order would silently give a resumed run other rows."""
    mix = plan_mix(weighted(3, 1), [800, 800], SEQ_LEN)
    sources, numbers = mix.place(np.arange(12), 42)
    assert (sources.tolist(), numbers.tolist()) == PINNED_PLACES
    loader = make_loader(weighted(3, 1, 2))
    assert [loader.step(step).sample_hash for step in (1, 2, 1000)] == PINNED_HASHES


PINNED_PLACES = ([0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0], [0, 1, 2, 0, 3, 4, 5, 1, 6, 7, 8, 9])
PINNED_HASHES = ["6173fe0af41652ae", "4b51ddc60dc53ef7", "5aad7b5b47688ccb"]


def test_each_source_gives_its_share_and_every_window_once_an_epoch() -> None:
    loader = make_loader(weighted(2, 1, 1))
    rows = rows_read(loader, range(1, 256 * 8 // 16 + 1))
    assert Counter(source for source, _ in rows) == {0: 1024, 1: 512, 2: 512}
    for index, tokens in enumerate((400, 96, 960)):
        own = [start for source, start in rows if source == index]
        orders = []
        for first in range(0, len(own) - tokens // SEQ_LEN + 1, tokens // SEQ_LEN):
            epoch = own[first : first + tokens // SEQ_LEN]
            assert len({start % SEQ_LEN for start in epoch}) == 1  # one phase
            assert len(set(epoch)) == tokens // SEQ_LEN
            orders.append(tuple(start // SEQ_LEN for start in epoch))
        assert len(set(orders)) == len(orders) > 3
    same_size = make_loader(weighted(1, 1), tokens=(800, 800))  # two sources do not follow one order
    rows = rows_read(same_size, range(1, 13))
    assert [s for i, s in rows if i == 0][:90] != [s for i, s in rows if i == 1][:90]


@pytest.mark.parametrize("shuffle", [True, False])
def test_ids_are_unique_and_an_epoch_reads_each_window_once(shuffle: bool) -> None:
    sources = in_epochs(2, 1, None)  # 50, 12 and 120 rows: 232 in an epoch of the mix
    loader = make_loader(sources, shuffle=shuffle, global_batch_size=8)
    assert loader.rows_per_epoch == 232
    assert loader.steps_per_epoch == 29
    placed = [loader._order.step(step) for step in range(1, 29 * 16 + 1)]  # 16 epochs: 14.5 blocks of 256
    ids = np.concatenate([rows.samples for rows in placed])
    assert len(set(ids.tolist())) == len(ids)
    streams = np.array([index for rows in placed for index in rows.streams])
    blocks = 14 * 256
    for index, per_epoch in enumerate((50, 12, 120)):
        own = ids[:blocks][streams[:blocks] == index] // 3  # epoch * R + window
        numbers = sorted(own.tolist())
        whole = len(numbers) // per_epoch * per_epoch
        assert numbers[:whole] == list(range(whole))
        assert abs(len(numbers) - blocks * [100, 12, 120][index] / 232) < 1


def test_without_shuffling_each_source_is_read_in_order() -> None:
    loader = make_loader(weighted(1, 2, 1), shuffle=False)
    rows = rows_read(loader, range(1, 21))
    for index, tokens in enumerate((400, 96, 960)):
        own = [start for source, start in rows if source == index]
        assert own == [number * SEQ_LEN % tokens for number in range(len(own))]
    assert len({tuple(source for source, _ in rows[i : i + 16]) for i in range(0, 320, 16)}) > 15


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_same_rows_for_any_world_size(world_size: int) -> None:
    one = make_loader(weighted(5, 1, 3))
    ranks = [make_loader(weighted(5, 1, 3), rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (1, 2, 3, 17, 100, 10**9):
        whole, parts = one.step(step), [loader.step(step) for loader in ranks]
        dealt = [part.micro_batches[i] for i in range(8 // world_size) for part in parts]
        assert all(same(a, b) for a, b in zip(whole.micro_batches, dealt, strict=True))
        assert {part.sample_hash for part in parts} == {whole.sample_hash}
        assert sum(part.num_targets for part in parts) == whole.num_targets


@pytest.mark.parametrize("rows", [2, 16, 48, 600])
def test_resuming_at_any_step_gives_the_same_batches(rows: int) -> None:
    end = 60 if rows < 100 else 10
    whole = list(make_loader(weighted(5, 1, 3), global_batch_size=rows).steps(1, end, 4))
    for start in (1, 2, end // 2, end - 1):
        again = make_loader(weighted(5, 1, 3), global_batch_size=rows).steps(start, end, 2)
        for a, b in zip(whole[start - 1 :], again, strict=True):
            assert (a.step, a.sample_hash, a.num_targets) == (b.step, b.sample_hash, b.num_targets)
            assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    assert len({batch.sample_hash for batch in whole}) == end - 1


def test_a_row_stays_in_its_source() -> None:
    loader = make_loader(weighted(1, 1, 1), tokens=(20, 30, 41))  # rows read around the end often
    seen = set()
    for step in range(1, 60):
        for batch in loader.step(step).micro_batches:
            for row, labels in zip(batch.input_ids, batch.labels, strict=True):
                source = sum(int(row[0]) >= base for base in BASES) - 1
                base, count = BASES[source], (20, 30, 41)[source]
                start = int(row[0]) - base
                expected = [base + (start + t) % count for t in range(SEQ_LEN + 1)]
                assert row.tolist() == expected[:-1]
                real = labels != -100
                assert torch.equal(labels[real], torch.tensor(expected[1:])[real])
                seen.add((source, start + SEQ_LEN > count))
    assert len(seen) == 6


def test_one_source_with_a_weight_is_read_whole() -> None:
    loader = make_loader(weighted(0.5), tokens=(400,), global_batch_size=10)
    assert loader.rows_per_epoch == 50
    assert sorted(start for _, start in rows_read(loader, range(1, 6))) == list(range(0, 400, 8))


def test_weights_are_taken_as_written() -> None:
    mix = plan_mix(weighted(0.1, 0.2, 0.7), [80, 80, 80], SEQ_LEN)
    assert mix.shares == (Fraction(1, 10), Fraction(1, 5), Fraction(7, 10))
    assert (mix.rows_per_epoch, mix.rows, mix.names) == (30, (10, 10, 10), ("s0", "s1", "s2"))
    scaled = plan_mix(weighted(1, 2, 7), [80, 80, 80], SEQ_LEN)
    assert scaled == mix


def test_epochs_are_shares_by_size() -> None:
    mix = plan_mix(in_epochs(2, None, 0.5), [80, 240, 160], SEQ_LEN)
    assert mix.shares == (Fraction(20, 60), Fraction(30, 60), Fraction(10, 60))
    assert mix.rows_per_epoch == 60
    assert epochs_by_source(mix, 60) == {"s0": 2.0, "s1": 1.0, "s2": 0.5}
    assert epochs_by_source(mix, 120) == {"s0": 4.0, "s1": 2.0, "s2": 1.0}


def test_a_rare_source_gets_its_rows() -> None:
    mix = plan_mix(weighted(1, 1e-5), [8000, 8000], SEQ_LEN)
    assert mix.counts(100_001) == [100_000, 1]
    assert mix.counts(10 * 100_001) == [1_000_000, 10]
    block = next(block for block in range(400) if mix.counts((block + 1) * 256)[1])
    sources, numbers = mix.place(np.arange(block * 256, block * 256 + 256), 0)
    assert numbers[sources == 1].tolist() == [0]


@pytest.mark.parametrize(
    ("sources", "tokens", "message"),
    [
        (weighted(1, 1), (80, 7), r"the source s1 has 7 tokens, fewer than one row of 8"),
        (in_epochs(1, 1), (0, 80), r"the source s0 has 0 tokens"),
    ],
)
def test_what_cannot_be_mixed(sources: list[SourceConfig], tokens: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_mix(sources, tokens, SEQ_LEN)


def test_description_and_warning() -> None:
    sources = [SourceConfig(path="books/", name="books", weight=3), SourceConfig(path="letters", weight=1)]
    mix: Mix = plan_mix(sources, [80_000, 800], SEQ_LEN)
    assert describe_mix(mix, [12, 3], [80_000, 800], 2000) == [
        "books: 12 documents of 80,000 tokens, 75.0% of the rows, 0.15 epochs",
        "letters: 3 documents of 800 tokens, 25.0% of the rows, 5.00 epochs",
    ]
    (warning,) = repeated_sources(mix, 2000)
    assert "letters is repeated 5.0 times" in warning
    assert repeated_sources(mix, 1600) == []
