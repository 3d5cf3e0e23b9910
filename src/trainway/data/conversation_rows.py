"""Rows of conversations: packed whole into full rows, or one to a row; targets are the tokens that the mask names.

The rows of a stream are the same in every epoch as far as lengths go, so an epoch has a fixed number of them. Each
epoch deals the documents of equal length anew and visits the rows in another keyed order. What is kept is an index of
the documents, sorted once for each epoch in hand: after that any step costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from trainway.data.batch import IGNORE_INDEX, Batch, Packing, restarting_positions
from trainway.data.packing import by_length, pack
from trainway.data.permutation import DEAL, ORDER, order_key, permute
from trainway.data.store import TokenSplit
from trainway.errors import ConfigError, DataError

PAD_MULTIPLE = 8
"""Padded rows are as long as a multiple of this: the shapes that matrix units are fast at."""
EPOCHS_HELD = 2  # a step may straddle two


class ConversationRows:
    """Rows of streams with masks: `packing` documents fills rows of `seq_len`, none gives each document a row.

    Raises ConfigError for another packing, DataError for a stream without documents.
    """

    def __init__(
        self,
        streams: Sequence[TokenSplit],
        *,
        seq_len: int,
        packing: Packing,
        seed: int,
        shuffle: bool,
        mixed: bool,
    ) -> None:
        if packing == "concat":
            raise ConfigError(
                "data.packing concat is for pretraining",
                "conversations are learnt one by one: none may see another",
                "use data.packing=documents or none",
            )
        self._streams = [
            _Documents(stream, seq_len, packing, seed, shuffle, (index,) if mixed else ())
            for index, stream in enumerate(streams)
        ]
        self._seq_len = seq_len
        self._is_packed = packing == "documents"
        self._shuffle = shuffle
        self.rows_per_epoch = tuple(stream.num_rows for stream in self._streams)

    def place(self, stream: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a stream's rows, epoch * R + row, which are their places as well; see `loader.RowSource`."""
        ids = self._streams[stream].ids(numbers)
        return ids, ids

    def arrange(self, streams: Sequence[int], places: np.ndarray) -> np.ndarray | None:
        """Shuffled rows of one document each are dealt longest first, so that a micro-batch needs little padding."""
        if self._is_packed or not self._shuffle:
            return None
        return self._longest_first(streams, places)

    def longest(self, count: int) -> tuple[list[int], np.ndarray]:
        """Streams and places of the longest rows; see `loader.RowSource`."""
        lengths = [stream.row_lengths() for stream in self._streams]
        rows = np.concatenate([np.arange(len(own), dtype=np.int64) for own in lengths])
        streams = np.repeat(np.arange(len(lengths)), [len(own) for own in lengths])
        order = np.resize(np.argsort(-np.concatenate(lengths), kind="stable"), count)
        return streams[order].tolist(), rows[order]

    def batch(self, streams: Sequence[int], places: np.ndarray) -> Batch:
        """The rows at `places` of `streams`, packed or padded."""
        splits = [self._streams[index].split for index in streams]
        rows = [
            self._streams[index].spans(place) for index, place in zip(streams, places.tolist(), strict=True)
        ]
        return _make_batch(splits, rows, self._width(rows), self._is_packed)

    def document(self, stream: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of the one document of an unpacked row: [T] unsigned and [T] uint8, views where possible."""
        split = self._streams[stream].split
        starts, lengths = self._streams[stream].spans(place)
        start, stop = int(starts[0]), int(starts[0] + lengths[0])
        return split.tokens(start, stop), split.mask(start, stop)

    def spread(self, max_tokens: int | None) -> np.ndarray:
        """Places of the first stream's rows in order, evenly spread and of about `max_tokens` in all, at least one."""
        whole, tokens = self.rows_per_epoch[0], self._streams[0].split.num_tokens
        wanted = whole
        if max_tokens is not None and max_tokens < tokens:
            wanted = max(1, whole * max_tokens // tokens)
        places = np.arange(wanted, dtype=np.int64) * whole // wanted
        return places if self._is_packed else places[self._longest_first([0] * wanted, places)]

    def blank(self) -> Batch:
        """A row of filling: a sharded model needs every rank in every forward pass."""
        split = self._streams[0].split
        return _make_batch([split], [(_NONE, _NONE)], min(PAD_MULTIPLE, self._seq_len), self._is_packed)

    def _longest_first(self, streams: Sequence[int], places: np.ndarray) -> np.ndarray:
        lengths = [
            self._streams[index].spans(place)[1].sum()
            for index, place in zip(streams, places.tolist(), strict=True)
        ]
        return np.argsort(-np.array(lengths), kind="stable")

    def _width(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
        if self._is_packed:
            return self._seq_len
        longest = max(int(lengths.sum()) for _, lengths in rows)
        return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self._seq_len)


def conversation_validation(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    packing: Packing,
    max_tokens: int | None,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Every document of the split once, in packed or padded rows. Raises DataError when there is none."""
    rows = ConversationRows([split], seq_len=seq_len, packing=packing, seed=0, shuffle=False, mixed=False)
    return _validation_batches(rows, rows.spread(max_tokens), micro_batch_size, rank, world_size)


def count_rows(split: TokenSplit, seq_len: int, packing: Packing) -> int:
    """Rows in one pass over the conversations of a split."""
    if packing == "none":
        return split.num_documents
    return pack(_lengths(split, _starts(split)), seq_len).num_rows


_NONE = np.empty(0, dtype=np.int64)


class _Documents:
    """The documents of one stream and the rows that they make in each epoch."""

    def __init__(
        self,
        split: TokenSplit,
        seq_len: int,
        packing: Packing,
        seed: int,
        shuffle: bool,
        source: tuple[int, ...],
    ) -> None:
        if not split.num_documents:
            raise DataError(f"the {split.name} split has no conversation", fix="add conversations to it")
        self.split = split
        self._starts = _starts(split)
        self._lengths = _lengths(split, self._starts)
        if int(self._lengths.max()) > seq_len:
            raise DataError(
                f"the {split.name} split has a conversation of {int(self._lengths.max())} tokens, "
                f"more than one row of {seq_len}",
                fix="prepare the data again with this train.seq_len",
            )
        self._packed = pack(self._lengths, seq_len) if packing == "documents" else None
        self.num_rows = self._packed.num_rows if self._packed else split.num_documents
        self._seed, self._shuffle, self._source = seed, shuffle, source
        self._dealt: dict[int, np.ndarray] = {}
        self._in_order = None if shuffle or self._packed is None else self._rows_in_order()

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """epoch * R + row for rows by their number in the run."""
        epochs, rows = np.divmod(numbers, self.num_rows)
        if self._shuffle:
            for epoch in np.unique(epochs).tolist():
                own = epochs == epoch
                key = order_key(self._seed, epoch, ORDER, *self._source)
                rows[own] = permute(rows[own], self.num_rows, key)
        elif self._in_order is not None:
            rows = self._in_order[rows]
        return epochs * self.num_rows + rows

    def spans(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of a row begin in the split, and their lengths: two int64 arrays."""
        epoch, row = divmod(place, self.num_rows)
        if self._packed is None:
            return self._starts[row : row + 1], self._lengths[row : row + 1]
        documents = np.sort(self._deal(epoch)[self._packed.row(row)])
        return self._starts[documents], self._lengths[documents]

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row: the same in every epoch."""
        if self._packed is None:
            return self._lengths
        lengths = self._lengths[self._deal(0)[self._packed.slots]]
        return np.add.reduceat(lengths, self._packed.row_starts[:-1])

    def _deal(self, epoch: int) -> np.ndarray:
        """The document that each slot of the packed rows has in an epoch."""
        epoch = epoch if self._shuffle else 0
        if epoch not in self._dealt:
            while len(self._dealt) >= EPOCHS_HELD:
                del self._dealt[min(self._dealt)]
            count = len(self._lengths)
            key = order_key(self._seed, epoch, DEAL, *self._source)
            priority = permute(np.arange(count), count, key) if self._shuffle else None
            self._dealt[epoch] = by_length(self._lengths, priority)
        return self._dealt[epoch]

    def _rows_in_order(self) -> np.ndarray:
        """The rows sorted by the first of their documents: without shuffling they come as the documents do."""
        assert self._packed is not None
        documents = self._deal(0)[self._packed.slots]
        return np.argsort(np.minimum.reduceat(documents, self._packed.row_starts[:-1]), kind="stable")


def _starts(split: TokenSplit) -> np.ndarray:
    return split.document_starts(0, split.num_tokens)


def _lengths(split: TokenSplit, starts: np.ndarray) -> np.ndarray:
    return np.diff(starts, append=split.num_tokens)


def _make_batch(
    splits: Sequence[TokenSplit],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    width: int,
    is_packed: bool,
) -> Batch:
    """rows: of each the (starts, lengths) of its documents; what they leave of `width` is filling."""
    count = len(rows)
    tokens = np.full(count * width, splits[0].pad_id, dtype=np.int64)
    trained = np.zeros(count * width, dtype=np.uint8)
    begins: list[int] = []
    num_tokens = 0
    for row, (split, (starts, lengths)) in enumerate(zip(splits, rows, strict=True)):
        at = row * width
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            begins.append(at)
            tokens[at : at + length] = split.tokens(start, start + length)
            trained[at : at + length] = split.mask(start, start + length)
            at += length
            num_tokens += length
        if at < (row + 1) * width:
            begins.append(at)  # the filling is a segment of its own
    trained[begins] = 0  # nothing before a document's first token is there to predict it
    targets = np.flatnonzero(trained) - 1
    labels = np.full(count * width, IGNORE_INDEX, dtype=np.int64)
    labels[targets] = tokens[targets + 1]
    boundaries = np.array([*begins, count * width])
    # A padded row is one segment to the model: what fills it lies behind every token that counts.
    positions = restarting_positions(boundaries) if is_packed else np.tile(np.arange(width), count)
    return Batch(
        torch.from_numpy(tokens.reshape(count, width)),
        torch.from_numpy(labels.reshape(count, width)),
        torch.from_numpy(positions.reshape(count, width)),
        tuple(boundaries.tolist()) if is_packed else None,
        len(targets),
        num_tokens,
        torch.from_numpy(targets),
    )


def _validation_batches(
    rows: ConversationRows, places: np.ndarray, micro_rows: int, rank: int, world_size: int
) -> Iterator[Batch]:
    for first in range(0, len(places), world_size * micro_rows):
        own = places[first + rank * micro_rows :][:micro_rows]
        yield rows.batch([0] * len(own), own) if len(own) else rows.blank()
