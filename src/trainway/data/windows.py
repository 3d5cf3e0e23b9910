"""Rows of pretraining: windows of a circular stream of tokens.

The split is a circular stream of T tokens. Epoch e cuts it into R = T // L windows of L tokens, from a phase
that depends on e, and visits them in a keyed random order; nothing is kept, and any step costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from trainway.data.batch import IGNORE_INDEX, Batch, Packing, restarting_positions
from trainway.data.permutation import ORDER, PHASE, order_key, permute
from trainway.data.store import TokenSplit
from trainway.errors import ConfigError, DataError


class WindowRows:
    """Rows of `seq_len` tokens, each predicting the next; a row is found by its number alone.

    Raises ConfigError for packing none, DataError when a stream has fewer than `seq_len` tokens.
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
        if packing == "none":
            raise ConfigError(
                "data.packing none is for conversations",
                "pretraining reads documents as one stream of tokens",
                "use data.packing=documents or concat",
            )
        for stream in streams:
            if stream.num_tokens < seq_len:
                raise DataError(
                    f"the {stream.name} split has {stream.num_tokens} tokens, fewer than one row of {seq_len}",
                    fix="add documents, or set train.seq_len lower",
                )
        self._streams = tuple(streams)
        self._seq_len = seq_len
        self._packing: Packing = packing
        self._seed = seed
        self._shuffle = shuffle
        self._mixed = mixed
        self.rows_per_epoch = tuple(stream.num_tokens // seq_len for stream in streams)

    def place(self, stream: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (epoch * R + window) and first positions of a stream's rows; see `loader.RowSource`."""
        source = (stream,) if self._mixed else ()
        per_epoch = self.rows_per_epoch[stream]
        epochs = numbers // per_epoch
        windows = numbers - epochs * per_epoch
        phases = np.zeros_like(numbers)
        for epoch in np.unique(epochs).tolist() if self._shuffle else ():
            own = epochs == epoch
            windows[own] = permute(windows[own], per_epoch, order_key(self._seed, epoch, ORDER, *source))
            phases[own] = order_key(self._seed, epoch, PHASE, *source) % self._seq_len if epoch else 0
        starts = (windows * self._seq_len + phases) % self._streams[stream].num_tokens
        return epochs * per_epoch + windows, starts

    def arrange(self, streams: Sequence[int], places: np.ndarray) -> np.ndarray | None:
        """All rows are equally long: they are dealt in the order in which they come."""
        return None

    def longest(self, count: int) -> tuple[list[int], np.ndarray]:
        """All rows are equally long: the first ones of the first stream."""
        return [0] * count, np.arange(count, dtype=np.int64) % self.rows_per_epoch[0] * self._seq_len

    def batch(self, streams: Sequence[int], places: np.ndarray) -> Batch:
        """The rows that begin at `places` of `streams`."""
        splits = [self._streams[index] for index in streams]
        return _make_batch(splits, places, self._seq_len, self._packing)


def window_validation(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    packing: Packing,
    max_tokens: int | None,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """The rows of the split in order, unshuffled, the last one filled up with eos that is not predicted.

    Raises DataError for a tiny split.
    """
    if split.num_tokens < 2:
        raise DataError(f"the {split.name} split has {split.num_tokens} tokens: nothing can be predicted",
                        fix="add validation documents")  # fmt: skip
    whole = -(-(split.num_tokens - 1) // seq_len)
    wanted = whole if max_tokens is None else min(whole, max(1, max_tokens // seq_len))
    rows = np.arange(wanted, dtype=np.int64) * whole // wanted
    return _validation_batches(split, rows, seq_len, micro_batch_size, packing, rank, world_size)


def _make_batch(splits: Sequence[TokenSplit], starts: np.ndarray, seq_len: int, packing: Packing) -> Batch:
    """Rows of seq_len + 1 tokens, row i beginning at starts[i] of splits[i], read around the end of that stream."""
    rows = len(starts)
    window = np.empty((rows, seq_len + 1), dtype=np.int64)
    found: list[np.ndarray] = []  # document starts, as positions in the flattened rows
    for row, start in enumerate(starts.tolist()):
        split, stop = splits[row], start + seq_len + 1
        total = split.num_tokens
        if stop <= total:
            window[row] = split.tokens(start, stop)
        else:
            window[row, : total - start] = split.tokens(start, total)
            window[row, total - start :] = split.tokens(0, stop - total)
        if packing == "documents":
            found.append(split.document_starts(start + 1, min(stop, total)) + (row * seq_len - start))
            if stop > total:
                found.append(split.document_starts(0, stop - total) + (row * seq_len - start + total))
    return _finish_batch(window, found, packing, rows * seq_len)


def _finish_batch(window: np.ndarray, found: list[np.ndarray], packing: Packing, num_targets: int) -> Batch:
    """window: [B, L+1]. found: flattened positions (1..L of each row) at which a document starts."""
    rows, seq_len = window.shape[0], window.shape[1] - 1
    labels = window[:, 1:].copy()
    row_starts = np.arange(0, rows * seq_len + 1, seq_len)
    if packing == "concat":
        positions = np.broadcast_to(np.arange(seq_len), (rows, seq_len)).copy()
        boundaries = row_starts
    else:
        begins = np.concatenate(found)
        flat = labels.reshape(-1)
        num_targets -= int(np.count_nonzero(flat[begins - 1] != IGNORE_INDEX))
        flat[begins - 1] = IGNORE_INDEX  # the last token of a document does not predict the next document
        # A start at position L of a row coincides with the next row's start.
        boundaries = np.unique(np.concatenate((begins, row_starts)))
        positions = restarting_positions(boundaries).reshape(rows, seq_len)
    return Batch(
        torch.from_numpy(window[:, :-1].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        tuple(boundaries.tolist()),
        num_targets,
        rows * seq_len,
    )


def _validation_batches(
    split: TokenSplit,
    rows: np.ndarray,
    seq_len: int,
    micro_rows: int,
    packing: Packing,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    for first in range(0, len(rows), world_size * micro_rows):
        starts = rows[first + rank * micro_rows :][:micro_rows] * seq_len
        if not len(starts):
            yield _blank_batch(split.eos_id, seq_len)
        elif int(starts[-1]) + seq_len + 1 <= split.num_tokens:
            yield _make_batch([split] * len(starts), starts, seq_len, packing)
        else:
            yield _padded_batch(split, starts, seq_len, packing)


def _blank_batch(eos_id: int, seq_len: int) -> Batch:
    """A row without targets, for a rank that has none left: a sharded model needs every rank in every forward pass."""
    tokens = torch.full((1, seq_len), eos_id)
    positions = torch.arange(seq_len)[None]
    return Batch(tokens, torch.full_like(tokens, IGNORE_INDEX), positions, (0, seq_len), 0, 0)


def _padded_batch(split: TokenSplit, starts: np.ndarray, seq_len: int, packing: Packing) -> Batch:
    """Like _make_batch, but the last row reaches past the end: eos from there on, without targets."""
    window = np.full((len(starts), seq_len + 1), split.eos_id, dtype=np.int64)
    found: list[np.ndarray] = []
    for row, start in enumerate(starts.tolist()):
        stop = min(start + seq_len + 1, split.num_tokens)
        window[row, : stop - start] = split.tokens(start, stop)
        found.append(split.document_starts(start + 1, stop) + (row * seq_len - start))
    real = split.num_tokens - int(starts[-1])  # tokens of the last row
    found.append(np.array([(len(starts) - 1) * seq_len + real]))  # the filling is a segment of its own
    batch = _finish_batch(window, found, packing, len(starts) * seq_len)
    batch.labels[-1, real - 1 :] = IGNORE_INDEX
    num_targets = int((batch.labels != IGNORE_INDEX).sum())
    return replace(batch, num_targets=num_targets, num_tokens=batch.num_tokens - seq_len + min(real, seq_len))
