"""Batches of conversations against an obvious reference: every target once an epoch, none across documents."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainway.config.schema import SourceConfig
from trainway.data.conversation_rows import count_rows
from trainway.data.loader import IGNORE_INDEX, Batch, Loader, validation_batches
from trainway.data.mix import mix_rows
from trainway.data.store import StoreWriter, TokenSplit, TokenStore
from trainway.errors import ConfigError, DataError

EOS, PAD = 1, 2
LENGTHS = [5, 3, 8, 2, 4, 4, 3, 6, 1, 5, 3, 2, 7]


def documents_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (each its own), starts and mask: every third token is none that is learnt; some first tokens are."""
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(starts[-1], dtype=np.uint32) + 10
    mask = (tokens % 3 != 0).astype(np.uint8)
    return tokens, starts, mask


def make_split(lengths: list[int], pad_id: int | None = PAD) -> TokenSplit:
    tokens, starts, mask = documents_of(lengths)
    return TokenSplit.from_arrays(tokens, starts, EOS, mask=mask, pad_id=pad_id)


def make_loader(split: TokenSplit | list[TokenSplit], **changes: Any) -> Loader:
    given = {
        "seq_len": 8, "global_batch_size": 4, "micro_batch_size": 2, "seed": 3, "packing": "documents", "shuffle": True,
    }  # fmt: skip
    return Loader(split, **{**given, **changes})


def pairs_in(batch: Batch) -> list[tuple[int, int]]:
    """(token, label) of every target."""
    wanted = batch.labels != IGNORE_INDEX
    return list(zip(batch.input_ids[wanted].tolist(), batch.labels[wanted].tolist(), strict=True))


def pairs_of(lengths: list[int]) -> Counter[tuple[int, int]]:
    """The same of whole documents, read one token at a time."""
    tokens, starts, mask = documents_of(lengths)
    return Counter(
        (int(tokens[at]), int(tokens[at + 1]))
        for start, stop in itertools.pairwise(starts.tolist())
        for at in range(start, stop - 1)
        if mask[at + 1]
    )


def documents_in(batch: Batch) -> list[int]:
    """First tokens of the documents, filling left out."""
    flat = batch.input_ids.flatten().tolist()
    if batch.boundaries is None:
        return [row[0] for row in batch.input_ids.tolist()]
    return [flat[at] for at in batch.boundaries[:-1] if flat[at] not in (EOS, PAD)]


def same(a: Batch, b: Batch) -> bool:
    facts = ("boundaries", "num_targets", "num_tokens")
    tensors = ("input_ids", "labels", "position_ids", "targets")
    return all(getattr(a, name) == getattr(b, name) for name in facts) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )


def check(batch: Batch, packing: str, seq_len: int) -> None:
    rows, width = batch.input_ids.shape
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    wanted = (batch.labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    assert batch.targets is not None
    assert torch.equal(batch.targets, wanted)
    assert batch.num_targets == len(wanted)
    # what is predicted is the token that follows; no label stands at or for filling
    flat = batch.input_ids.flatten()
    assert torch.equal(batch.labels.flatten()[wanted], flat[wanted + 1])
    assert not ((flat[wanted] == PAD) | (flat[wanted + 1] == PAD)).any()
    assert batch.num_tokens == int((flat != PAD).sum())
    if packing == "none":
        assert batch.boundaries is None
        assert torch.equal(batch.position_ids, torch.arange(width).expand(rows, width))
        assert width <= seq_len
        return
    assert width == seq_len
    assert batch.boundaries is not None
    assert (batch.boundaries[0], batch.boundaries[-1]) == (0, rows * width)
    assert list(batch.boundaries) == sorted(set(batch.boundaries))
    assert set(range(0, rows * width, width)) <= set(batch.boundaries)
    assert (batch.position_ids.flatten() == 0).nonzero().flatten().tolist() == list(batch.boundaries[:-1])
    ends = torch.tensor(batch.boundaries[1:]) - 1
    assert (batch.labels.flatten()[ends] == IGNORE_INDEX).all()  # a document's last token predicts nothing


def test_a_packed_batch() -> None:
    split = make_split([3, 4, 7])
    (batch,) = (
        make_loader(split, global_batch_size=2, micro_batch_size=2, shuffle=False).step(1).micro_batches
    )
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 2], [17, 18, 19, 20, 21, 22, 23, 2]]
    assert batch.labels.tolist() == [
        [11, -100, -100, 14, -100, 16, -100, -100],
        [-100, 19, 20, -100, 22, 23, -100, -100],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert batch.boundaries == (0, 3, 7, 8, 15, 16)
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 3, 5, 9, 10, 12, 13]
    assert (batch.num_targets, batch.num_tokens) == (7, 14)


def test_a_padded_batch() -> None:
    split = make_split([3, 4, 11], pad_id=None)
    loader = make_loader(
        split, seq_len=20, packing="none", global_batch_size=3, micro_batch_size=3, shuffle=False
    )
    (batch,) = loader.step(1).micro_batches
    assert batch.input_ids.shape == (3, 16)  # 11, rounded up to a multiple of 8
    assert batch.input_ids[0].tolist() == [10, 11, 12] + [EOS] * 13  # no pad token: eos, never a target
    assert batch.labels[0].tolist() == [11] + [-100] * 15
    assert batch.labels[2].tolist() == [-100, 19, 20, -100, 22, 23, -100, 25, 26, -100] + [-100] * 6
    assert batch.position_ids[1].tolist() == list(range(16))
    assert batch.boundaries is None
    assert batch.num_tokens == 18
    # never longer than the model's rows
    short = make_loader(split, seq_len=11, packing="none", global_batch_size=3, micro_batch_size=3)
    assert short.step(1).micro_batches[0].input_ids.shape == (3, 11)


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=14),
    extra=st.integers(0, 6),
    packing=st.sampled_from(["documents", "none"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 4),
)
def test_every_epoch_has_every_document_once(
    lengths: list[int], extra: int, packing: str, shuffle: bool, seed: int
) -> None:
    seq_len, split = max(lengths) + extra, make_split(lengths)
    loader = make_loader(
        split,
        seq_len=seq_len,
        packing=packing,
        shuffle=shuffle,
        seed=seed,
        global_batch_size=1,
        micro_batch_size=1,
    )
    rows = loader.rows_per_epoch
    assert rows == count_rows(split, seq_len, packing)  # type: ignore[arg-type]
    firsts = sorted(split.document_starts(0, split.num_tokens).tolist())
    for epoch in (0, 1, 7):
        batches = [loader.step(1 + epoch * rows + row).micro_batches[0] for row in range(rows)]
        for batch in batches:
            check(batch, packing, seq_len)
        assert sorted(first - 10 for batch in batches for first in documents_in(batch)) == firsts
        assert Counter(pair for batch in batches for pair in pairs_in(batch)) == pairs_of(lengths)


def test_packed_and_padded_epochs_teach_the_same() -> None:
    counts = {}
    for packing in ("documents", "none"):
        loader = make_loader(make_split(LENGTHS), packing=packing, global_batch_size=1, micro_batch_size=1)
        steps = [loader.step(step) for step in range(1, loader.rows_per_epoch + 1)]
        counts[packing] = Counter(pair for step in steps for pair in pairs_in(step.micro_batches[0]))
        assert sum(step.num_targets for step in steps) == counts[packing].total()
        assert sum(step.num_tokens for step in steps) == sum(LENGTHS)
    assert counts["documents"] == counts["none"] == pairs_of(LENGTHS)


def epoch_of(loader: Loader, epoch: int) -> list[tuple[int, ...]]:
    """The documents of each row, by their first tokens."""
    rows = loader.rows_per_epoch
    return [tuple(documents_in(loader.step(1 + epoch * rows + row).micro_batches[0])) for row in range(rows)]


def test_epochs_deal_anew_and_come_in_another_order() -> None:
    lengths = [3, 5] * 30
    loader = make_loader(make_split(lengths), global_batch_size=1, micro_batch_size=1)
    assert loader.rows_per_epoch == 30  # each a 3 and a 5
    epochs = [epoch_of(loader, epoch) for epoch in range(4)]
    assert len({frozenset(epoch) for epoch in epochs}) == 4  # other pairs share a row
    first = [epoch[0][0] for epoch in epochs]
    assert len(set(first)) > 1
    assert all(sorted(itertools.chain(*epoch)) == sorted(itertools.chain(*epochs[0])) for epoch in epochs)
    assert epoch_of(make_loader(make_split(lengths), global_batch_size=1, micro_batch_size=1), 2) == epochs[2]
    other = make_loader(make_split(lengths), global_batch_size=1, micro_batch_size=1, seed=4)
    assert epoch_of(other, 0) != epochs[0]
    still = make_loader(make_split(lengths), global_batch_size=1, micro_batch_size=1, shuffle=False)
    assert epoch_of(still, 0) == epoch_of(still, 3)


def test_without_shuffling_rows_come_as_the_documents_do() -> None:
    alone = make_loader(
        make_split(LENGTHS), packing="none", shuffle=False, global_batch_size=1, micro_batch_size=1
    )
    starts = np.cumsum([0, *LENGTHS[:-1]]) + 10
    assert epoch_of(alone, 0) == epoch_of(alone, 2) == [(start,) for start in starts.tolist()]
    # whole steps too: nothing is sorted by length
    batch = make_loader(make_split(LENGTHS), packing="none", shuffle=False).step(1).micro_batches[1]
    assert documents_in(batch) == starts[2:4].tolist()
    packed = epoch_of(
        make_loader(make_split(LENGTHS), shuffle=False, global_batch_size=1, micro_batch_size=1), 0
    )
    assert [row[0] for row in packed] == sorted(row[0] for row in packed)
    assert all(list(row) == sorted(row) for row in packed)


@pytest.mark.parametrize("packing", ["documents", "none"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_rows_for_any_world_size(packing: str, world_size: int) -> None:
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "packing": packing}
    one = make_loader(make_split(LENGTHS), **sizes)
    ranks = [
        make_loader(make_split(LENGTHS), **sizes, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (1, 2, 5, 100):
        whole = one.step(step)
        parts = [loader.step(step) for loader in ranks]
        dealt = [part.micro_batches[i] for i in range(4 // world_size) for part in parts]
        assert all(same(a, b) for a, b in zip(whole.micro_batches, dealt, strict=True))
        assert {part.sample_hash for part in parts} == {whole.sample_hash}
        assert sum(part.num_targets for part in parts) == whole.num_targets
        assert sum(part.num_tokens for part in parts) == whole.num_tokens


def test_padded_micro_batches_hold_rows_of_like_length() -> None:
    loader = make_loader(
        make_split(list(range(1, 65))), seq_len=64, packing="none", global_batch_size=16, micro_batch_size=4
    )
    for step in range(1, 5):
        widths = [batch.input_ids.shape[1] for batch in loader.step(step).micro_batches]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > widths[-1]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_resuming_at_any_step_gives_the_same_batches(packing: str) -> None:
    whole = list(make_loader(make_split(LENGTHS), packing=packing).steps(1, 30, 4))
    for start in (1, 2, 13, 29):
        again = list(make_loader(make_split(LENGTHS), packing=packing).steps(start, 30, 2))
        for a, b in zip(whole[start - 1 :], again, strict=True):
            assert (a.step, a.sample_hash, a.num_targets) == (b.step, b.sample_hash, b.num_targets)
            assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    assert len({batch.sample_hash for batch in whole}) == 29
    assert make_loader(make_split(LENGTHS), packing=packing).step(10**12).step == 10**12


@pytest.mark.parametrize(
    ("packing", "pinned"),
    [
        (
            "documents",
            {
                1: ("3048840d18264274", [10, 15, 18, 28, 32, 26, 39]),
                2: ("cec9598f2cbfc00c", [46, 51, 36, 54, 45, 56, 26, 51]),
                10**9: ("836f4aa1d616a3f6", [28, 32, 28, 32, 15, 26, 45, 56]),
            },
        ),
        (
            "none",
            {
                1: ("3048840d18264274", [18, 10, 28, 32]),
                2: ("979354ca9377f7b2", [39, 46, 26, 45]),
                10**9: ("3665bdec5b8e689d", [18, 10, 46, 15]),
            },
        ),
    ],
)
def test_pinned(packing: str, pinned: dict[int, tuple[str, list[int]]]) -> None:
    """A changed order would silently give a resumed run other rows."""
    loader = make_loader(make_split(LENGTHS), packing=packing)
    found = {}
    for step in (1, 2, 10**9):
        batches = loader.step(step).micro_batches
        found[step] = (loader.step(step).sample_hash, [first for b in batches for first in documents_in(b)])
    assert found == pinned


def test_a_mix_packs_each_source_by_itself() -> None:
    splits = [make_split(LENGTHS), make_split([4] * 10)]
    splits[1].name = "four"
    rows = [count_rows(split, 8, "documents") for split in splits]
    assert rows == [7, 5]
    sources = [SourceConfig(path="a", weight=3), SourceConfig(path="b", weight=1)]
    mix = mix_rows(sources, rows)
    assert mix.rows_per_epoch == 12
    loader = make_loader(splits, mix=mix, global_batch_size=8)
    placed = [loader._order.step(step) for step in range(1, 65)]  # two blocks of 256 rows
    streams = [index for rows in placed for index in rows.streams]
    assert (streams.count(0), streams.count(1)) == (384, 128)
    ids = np.concatenate([rows.samples for rows in placed])
    assert len(set(ids.tolist())) == len(ids)
    for index, per_epoch in enumerate((7, 5)):
        own = sorted(ids[np.array(streams) == index] // 2)
        assert own[: len(own) // per_epoch * per_epoch] == list(range(len(own) // per_epoch * per_epoch))
    for batch in loader.step(3).micro_batches:
        check(batch, "documents", 8)
    # two sources alike do not follow one order
    twins = make_loader(
        [make_split([8] * 40), make_split([8] * 40)],
        mix=mix_rows(sources, [40, 40]),
        global_batch_size=40,
        micro_batch_size=1,
    )
    rows_read = [twins._order.step(step) for step in (1, 2)]
    order = [
        [s // 2 for r in rows_read for s, i in zip(r.samples, r.streams, strict=True) if i == k]
        for k in (0, 1)
    ]
    assert order[0][: len(order[1])] != order[1]


def test_a_store_of_many_parts_gives_the_same_batches(tmp_path: Path) -> None:
    tokens, _, mask = documents_of(LENGTHS)
    facts: dict[str, Any] = {
        "tokenizer_hash": "", "bos_id": None, "eos_id": EOS, "pad_id": PAD, "sources": {}, "quarantined": 0,
    }  # fmt: skip
    with StoreWriter(tmp_path, 1000, part_bytes=30, masked=True) as writer:
        writer.append("train", tokens, np.array(LENGTHS), 0, mask)
        writer.append("val", np.array([5, 1]), np.array([2]), 0, np.array([False, True]))
        manifest = writer.finish(np.zeros(1000), **facts, conversations={"max_tokens": 8})
    assert len(manifest.splits["train"]["parts"]) == 5
    assert manifest.splits["train"]["trained"] == int(mask.sum())
    for packing in ("documents", "none"):
        parts = make_loader(TokenStore.open(tmp_path).split("train"), packing=packing)
        whole = make_loader(make_split(LENGTHS), packing=packing)
        for step in range(1, 20):
            pairs = zip(whole.step(step).micro_batches, parts.step(step).micro_batches, strict=True)
            assert all(same(a, b) for a, b in pairs)


def test_packings_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.packing concat is for pretraining"):
        make_loader(make_split(LENGTHS), packing="concat")
    documents = TokenSplit.from_arrays(np.arange(50, dtype=np.uint32), np.array([0, 50]), EOS)
    with pytest.raises(ConfigError, match=r"data\.packing none is for conversations"):
        make_loader(documents, packing="none")
    with pytest.raises(DataError, match="a conversation of 8 tokens, more than one row of 7"):
        make_loader(make_split(LENGTHS), seq_len=7)
    empty = TokenSplit.from_arrays(
        np.arange(0, dtype=np.uint32), np.array([0]), EOS, mask=np.array([], dtype=np.uint8)
    )
    with pytest.raises(DataError, match="the train split has no conversation"):
        make_loader(empty)


def validate(split: TokenSplit, **changes: Any) -> list[Batch]:
    given = {"seq_len": 8, "micro_batch_size": 2, "packing": "documents", "max_tokens": None}
    return list(validation_batches(split, **{**given, **changes}))


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_validation_reads_each_document_once_for_any_world_size(packing: str) -> None:
    split = make_split(LENGTHS)
    whole = validate(split, packing=packing)
    for batch in whole:
        check(batch, packing, 8)
    assert Counter(pair for batch in whole for pair in pairs_in(batch)) == pairs_of(LENGTHS)
    assert len(whole) == {"documents": 4, "none": 7}[packing]
    for world_size in (2, 3, 5):
        ranks = [
            validate(split, packing=packing, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1  # as many forward passes each
        dealt = [batch for turn in zip(*ranks, strict=True) for batch in turn]
        assert all(same(a, b) for a, b in zip(whole, dealt, strict=False))
        for blank in dealt[len(whole) :]:
            check(blank, packing, 8)
            assert (blank.num_targets, blank.num_tokens, blank.input_ids.tolist()) == (0, 0, [[PAD] * 8])


def test_limited_validation_reads_rows_spread_over_the_whole_split() -> None:
    split = make_split([8] * 20)
    firsts = [first for batch in validate(split, max_tokens=40) for first in documents_in(batch)]
    assert firsts == [10 + 8 * row for row in (0, 4, 8, 12, 16)]
    assert len(validate(split, max_tokens=160)) == 10
    alone = validate(make_split([4] * 20), packing="none", max_tokens=20)
    assert sum(batch.num_tokens for batch in alone) == 20
    assert sum(batch.num_tokens for batch in validate(split, max_tokens=1)) == 8


def test_a_batch_moves_with_its_targets() -> None:
    (batch, _) = make_loader(make_split(LENGTHS)).step(1).micro_batches
    moved = batch.to("meta")
    assert moved.targets is not None
    assert moved.targets.device.type == moved.input_ids.device.type == "meta"
    assert (moved.num_targets, moved.num_tokens, moved.boundaries) == (
        batch.num_targets,
        batch.num_tokens,
        batch.boundaries,
    )
    assert batch.to("cpu") is batch
