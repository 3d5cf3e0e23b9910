"""The loader against an obvious reference: each token once an epoch, the same rows for any ranks or resume."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainway.data.loader import IGNORE_INDEX, Batch, Loader, validation_batches
from trainway.data.permutation import permute
from trainway.data.store import StoreWriter, TokenSplit, TokenStore
from trainway.errors import ConfigError, DataError

EOS = 1


def make_split(lengths: list[int]) -> TokenSplit:
    starts = np.cumsum([0, *lengths])
    return TokenSplit.from_arrays(np.arange(starts[-1], dtype=np.uint32) + 10, starts, EOS)


def make_loader(split: TokenSplit, **changes: Any) -> Loader:
    given = {
        "seq_len": 8, "global_batch_size": 4, "micro_batch_size": 2, "seed": 3, "packing": "documents", "shuffle": True,
    }  # fmt: skip
    return Loader(split, **{**given, **changes})


def same(a: Batch, b: Batch) -> bool:
    tensors = ("input_ids", "labels", "position_ids")
    return (a.boundaries, a.num_targets) == (b.boundaries, b.num_targets) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 100, 257, 1000, 4096, 10_007, 123_456])
def test_permute_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        images = permute(np.arange(size), size, key)
        assert np.array_equal(np.sort(images), np.arange(size))
        assert np.array_equal(permute(np.arange(size)[::3], size, key), images[::3])


def test_permute_is_well_mixed() -> None:
    size = 100_000
    images = permute(np.arange(size), size, 7)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.02
    assert (np.abs(np.diff(images)) == 1).mean() < 1e-3
    # Where does the first tenth go? Uniform over ten bins, chi-square with 9 degrees of freedom.
    counts = np.histogram(images[: size // 10], bins=10, range=(0, size))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 30
    assert (permute(np.arange(size), size, 8) == images).mean() < 1e-3
    # All orders of a tiny set come up, none of them far too often.
    orders = [tuple(permute(np.arange(3), 3, key).tolist()) for key in range(1200)]
    frequency = [orders.count(order) for order in set(orders)]
    assert len(frequency) == 6
    assert 120 < min(frequency) <= max(frequency) < 290


def test_permute_costs_the_same_for_huge_sizes() -> None:
    size = 10**15 + 37
    index = np.array([0, 1, 5, size - 1])
    images = permute(index, size, 5)
    assert len(set(images.tolist())) == 4
    assert ((images >= 0) & (images < size)).all()
    assert images.tolist() != index.tolist()


@pytest.mark.parametrize(
    ("packing", "shuffle"), [("documents", True), ("concat", True), ("documents", False)]
)
def test_an_epoch_reads_every_token_once(packing: str, shuffle: bool) -> None:
    split = make_split([5, 11, 3, 29, 16])  # 64 tokens: 8 rows of 8
    loader = make_loader(split, packing=packing, shuffle=shuffle)
    assert (loader.rows_per_epoch, loader.steps_per_epoch) == (8, 2)
    orders = set()
    for epoch in range(6):
        steps = [loader.step(1 + epoch * 2 + i) for i in range(2)]
        inputs = torch.cat([batch.input_ids for step in steps for batch in step.micro_batches])
        assert sorted(inputs.flatten().tolist()) == list(range(10, 74))
        orders.add(tuple(inputs[:, 0].tolist()))
    assert len(orders) == (6 if shuffle else 1)


def test_the_remainder_of_an_epoch_moves_about() -> None:
    loader = make_loader(make_split([13, 17, 9]), packing="concat", global_batch_size=4, micro_batch_size=4)
    assert loader.rows_per_epoch == 4  # 39 tokens: 7 are left out
    left = []
    for epoch in range(8):
        seen = loader.step(epoch + 1).micro_batches[0].input_ids.flatten().tolist()
        assert len(set(seen)) == 32
        left.append(frozenset(range(10, 49)) - set(seen))
    assert left[0] == frozenset(range(42, 49))
    assert len(set(left)) > 3


def reference(lengths: list[int], starts: list[int], seq_len: int, packing: str) -> dict[str, Any]:
    """One token at a time, as the rules say it."""
    total = sum(lengths)
    begins = set(np.cumsum([0, *lengths[:-1]]).tolist())
    inputs: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    boundaries: list[int] = []
    targets = position = 0
    for start in starts:
        for t in range(seq_len):
            here, following = (start + t) % total, (start + t + 1) % total
            if t == 0 or (packing == "documents" and here in begins):
                boundaries.append(len(inputs))
                position = 0
            inputs.append(here + 10)
            positions.append(position)
            position += 1
            ignored = packing == "documents" and following in begins
            labels.append(IGNORE_INDEX if ignored else following + 10)
            targets += not ignored
    return {
        "inputs": inputs, "labels": labels, "positions": positions,
        "boundaries": (*boundaries, len(inputs)), "targets": targets,
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seq_len=st.integers(1, 9),
    packing=st.sampled_from(["documents", "concat"]),
    step=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_batches_equal_the_reference(
    lengths: list[int], seq_len: int, packing: str, step: int, seed: int
) -> None:
    seq_len = min(seq_len, sum(lengths))
    loader = make_loader(
        make_split(lengths),
        seq_len=seq_len,
        packing=packing,
        seed=seed,
        global_batch_size=3,
        micro_batch_size=3,
    )
    (batch,) = loader.step(step).micro_batches
    starts = [int(first) - 10 for first in batch.input_ids[:, 0]]
    expected = reference(lengths, starts, seq_len, packing)
    assert batch.input_ids.flatten().tolist() == expected["inputs"]
    assert batch.labels.flatten().tolist() == expected["labels"]
    assert batch.position_ids.flatten().tolist() == expected["positions"]
    assert batch.boundaries == expected["boundaries"]
    assert batch.num_targets == expected["targets"] == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert all(t.is_contiguous() for t in (batch.input_ids, batch.labels, batch.position_ids))


def test_a_row_reads_around_the_end() -> None:
    split = make_split([6, 4])
    loader = make_loader(split, seq_len=10, global_batch_size=1, micro_batch_size=1, shuffle=False)
    (batch,) = loader.step(1).micro_batches
    assert batch.labels.tolist() == [[11, 12, 13, 14, 15, -100, 17, 18, 19, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert batch.boundaries == (0, 6, 10)
    concat = make_loader(
        split, seq_len=10, global_batch_size=1, micro_batch_size=1, shuffle=False, packing="concat"
    )
    assert concat.step(1).micro_batches[0].labels.tolist() == [[11, 12, 13, 14, 15, 16, 17, 18, 19, 10]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_rows_for_any_world_size(world_size: int) -> None:
    split = make_split([5, 11, 3, 29, 16, 40, 7])
    one = make_loader(split, global_batch_size=8, micro_batch_size=1)
    ranks = [
        make_loader(split, global_batch_size=8, micro_batch_size=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (1, 2, 5, 100):
        whole = one.step(step)
        parts = [loader.step(step) for loader in ranks]
        dealt = [part.micro_batches[i] for i in range(8 // world_size) for part in parts]
        assert all(same(a, b) for a, b in zip(whole.micro_batches, dealt, strict=True))
        assert {part.sample_hash for part in parts} == {whole.sample_hash}
        assert sum(part.num_targets for part in parts) == whole.num_targets


def test_resuming_at_any_step_gives_the_same_batches() -> None:
    loader = make_loader(make_split([5, 11, 3, 29, 16, 40, 7]))
    whole = list(loader.steps(1, 30, 4))
    assert all(step.num_tokens == 32 for step in whole)
    assert [batch.step for batch in whole] == list(range(1, 30))
    for start in (1, 2, 13, 29):
        again = list(make_loader(make_split([5, 11, 3, 29, 16, 40, 7])).steps(start, 30, 2))
        for a, b in zip(whole[start - 1 :], again, strict=True):
            assert (a.step, a.sample_hash, a.num_targets) == (b.step, b.sample_hash, b.num_targets)
            assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    assert len({batch.sample_hash for batch in whole}) == 29
    assert make_loader(make_split([111]), seed=4).step(1).sample_hash != whole[0].sample_hash
    assert loader.step(10**12).step == 10**12


@pytest.mark.parametrize(
    ("shuffle", "pinned"),
    [
        (
            True,
            {
                1: "3048840d18264274",
                2: "979354ca9377f7b2",
                100: "654f760a9575939d",
                10**9: "3665bdec5b8e689d",
            },
        ),
        (
            False,
            {
                1: "2e81a9d8a2d098ea",
                2: "d26e693bf98b805b",
                100: "e876ae0833bc06b7",
                10**9: "4d4372e9dfa200e0",
            },
        ),
    ],
)
def test_pinned(shuffle: bool, pinned: dict[int, str]) -> None:
    """A changed order would silently give a resumed run other rows."""
    loader = make_loader(make_split([5, 11, 3, 29, 16, 40, 7]), shuffle=shuffle)
    assert {step: loader.step(step).sample_hash for step in pinned} == pinned
    if shuffle:
        firsts = [first for batch in loader.step(2).micro_batches for first in batch.input_ids[:, 0].tolist()]
        assert firsts == [34, 66, 74, 82]


def test_the_reading_thread_ends_with_the_iterator() -> None:
    before = threading.active_count()
    loader = make_loader(make_split([100]))
    steps = loader.steps(1, 10**9, 2)
    assert next(steps).step == 1
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before
    assert list(loader.steps(5, 5, 2)) == []


def test_an_error_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(make_split([100]))
    original = loader.step

    def failing(step: int) -> Any:
        if step == 3:
            raise OSError("the disk is gone")
        return original(step)

    monkeypatch.setattr(loader, "step", failing)
    seen: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(batch.step for batch in loader.steps(1, 10, 2))
    assert seen == [1, 2]
    assert not any(t.name == "batch-reader" for t in threading.enumerate())


def test_a_store_of_many_parts_gives_the_same_batches(tmp_path: Path) -> None:
    lengths = [5, 11, 3, 29, 16, 40, 7]
    tokens = np.arange(sum(lengths)) + 10
    facts: dict[str, Any] = {
        "tokenizer_hash": "",
        "bos_id": None,
        "eos_id": EOS,
        "pad_id": None,
        "sources": {},
        "quarantined": 0,
    }
    with StoreWriter(tmp_path, 1000, part_bytes=60) as writer:
        writer.append("train", tokens, np.array(lengths), 0)
        writer.append("val", np.array([5, 1]), np.array([2]), 0)
        assert len(writer.finish(np.zeros(1000), **facts).splits["train"]["parts"]) == 5
    parts = make_loader(TokenStore.open(tmp_path).split("train"))
    whole = make_loader(make_split(lengths))
    for step in range(1, 40):
        pairs = zip(whole.step(step).micro_batches, parts.step(step).micro_batches, strict=True)
        assert all(same(a, b) for a, b in pairs)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="the train split has 7 tokens, fewer than one row of 8"):
        make_loader(make_split([7]))
    with pytest.raises(
        ConfigError, match=r"4 is not divisible by micro_batch_size 3 x 1 ranks\nuse a multiple of 3"
    ):
        make_loader(make_split([100]), micro_batch_size=3)


def validate(split: TokenSplit, **changes: Any) -> list[Batch]:
    given = {"seq_len": 8, "micro_batch_size": 2, "packing": "documents", "max_tokens": None}
    return list(validation_batches(split, **{**given, **changes}))


@pytest.mark.parametrize("lengths", [[2], [8], [9], [3, 30, 1, 8, 15], [16, 16], [17, 16]])
@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_validation_predicts_each_token_once(lengths: list[int], packing: str) -> None:
    split = make_split(lengths)
    batches = validate(split, packing=packing)
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    begins = np.cumsum([0, *lengths[:-1]]).tolist() if packing == "documents" else [0]
    expected = [t + 10 for t in range(sum(lengths)) if t not in begins]
    assert labels[labels != IGNORE_INDEX].tolist() == expected
    assert sum(batch.num_targets for batch in batches) == len(expected)
    for batch in batches:
        rows = batch.input_ids.shape[0]
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (rows, 8)
        assert batch.boundaries[0] == 0
        assert batch.boundaries[-1] == rows * 8
        assert list(batch.boundaries) == sorted(set(batch.boundaries))
        if packing == "documents":
            assert (batch.position_ids.flatten() == 0).nonzero().flatten().tolist() == list(
                batch.boundaries[:-1]
            )


def test_the_last_validation_row_is_filled_with_eos() -> None:
    (batch,) = validate(make_split([3, 7]))
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17], [18, 19, 1, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[11, 12, -100, 14, 15, 16, 17, 18], [19] + [-100] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.boundaries == (0, 3, 8, 10, 16)
    assert (batch.num_tokens, batch.num_targets, batch.targets) == (10, 8, None)


def test_validation_reads_the_same_batches_for_any_world_size() -> None:
    split = make_split([50, 33, 20])
    whole = validate(split)
    assert len(whole) == 7
    for world_size in (2, 3, 4, 9):
        ranks = [validate(split, rank=rank, world_size=world_size) for rank in range(world_size)]
        for i, batch in enumerate(whole):
            assert same(batch, ranks[i % world_size][i // world_size])
        # the ranks take as many forward passes each: those left over are blank
        assert {len(batches) for batches in ranks} == {-(-7 // world_size)}
        blank = [
            batches[-1]
            for rank, batches in enumerate(ranks)
            if len(batches) * world_size - world_size + rank >= 7
        ]
        assert len(blank) == sum(map(len, ranks)) - 7
        assert all(batch.num_targets == 0 and bool((batch.labels == IGNORE_INDEX).all()) for batch in blank)


def test_limited_validation_reads_rows_spread_over_the_whole_split() -> None:
    split = make_split([50, 33, 20])  # 13 rows of 8
    rows = torch.cat([batch.input_ids for batch in validate(split)])
    limited = torch.cat([batch.input_ids for batch in validate(split, max_tokens=40)])
    assert torch.equal(limited, rows[[0, 2, 5, 7, 10]])
    assert sum(batch.input_ids.shape[0] for batch in validate(split, max_tokens=1)) == 1
    with pytest.raises(DataError, match="nothing can be predicted"):
        validate(make_split([1]))
