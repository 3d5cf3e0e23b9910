"""Rows of tokens for training: each step's batch is a pure function of (seed, step), for any number of ranks.

The split is a circular stream of T tokens. Epoch e cuts it into R = T // L windows of L tokens, from a phase
that depends on e, and visits them in a keyed random order; nothing is kept, and any step costs the same.
In a mix each source is such a stream of its own, and trainway.data.mix says whose turn it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash

from trainway.data.mix import Mix
from trainway.data.permutation import ORDER, PHASE, order_key, permute
from trainway.data.store import TokenSplit
from trainway.errors import ConfigError, DataError
from trainway.losses import IGNORE_INDEX

Packing = Literal["documents", "concat"]

PLACED_ROWS = 256


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of L tokens."""

    input_ids: torch.Tensor  # [B, L] int64
    labels: torch.Tensor  # [B, L] int64; labels[:, t] follows input_ids[:, t], or is IGNORE_INDEX
    position_ids: torch.Tensor  # [B, L] int64; 0 at the start of each segment
    boundaries: tuple[int, ...]  # segments over the flattened B*L tokens; the first is 0, the last B*L
    num_targets: int  # labels that are not IGNORE_INDEX

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; to a GPU the copy runs beside the computation."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        input_ids, labels, position_ids = (
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (self.input_ids, self.labels, self.position_ids)
        )
        return Batch(input_ids, labels, position_ids, self.boundaries, self.num_targets)


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimiser step."""

    step: int
    micro_batches: tuple[Batch, ...]
    num_targets: int  # of this rank
    sample_hash: str  # xxh3_64 of the step's global sample ids: the same on every rank and world size


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of the run: what each is called and where it is read."""

    first: int  # number of the first row
    samples: np.ndarray  # [rows] int64 ids, unique per (source, epoch, window)
    streams: list[int]  # of each row: which stream it is read from
    starts: np.ndarray  # [rows] int64 positions of the first tokens in those streams


class Loader:
    """The training batches of one rank.

    streams: the training split, or, with a `mix`, one stream for each of its sources.
    Raises ConfigError for sizes that do not divide, DataError when a stream has fewer than `seq_len` tokens.
    """

    def __init__(
        self,
        streams: TokenSplit | Sequence[TokenSplit],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        packing: Packing,
        shuffle: bool,
        mix: Mix | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not divisible by "
                f"micro_batch_size {micro_batch_size} x {world_size} ranks",
                fix=f"use a multiple of {micro_batch_size * world_size}",
            )
        self._streams = (streams,) if isinstance(streams, TokenSplit) else tuple(streams)
        assert len(self._streams) == (len(mix.names) if mix else 1)
        for stream in self._streams:
            if stream.num_tokens < seq_len:
                raise DataError(
                    f"the {stream.name} split has {stream.num_tokens} tokens, fewer than one row of {seq_len}",
                    fix="add documents, or set train.seq_len lower",
                )
        self._seq_len = seq_len
        self._rows_per_step = global_batch_size
        self._micro_rows = micro_batch_size
        self._seed = seed
        self._packing: Packing = packing
        self._shuffle = shuffle
        self._mix = mix
        self._rank = rank
        self._world_size = world_size
        self.rows_per_epoch = mix.rows_per_epoch if mix else self._streams[0].num_tokens // seq_len
        # Placing many rows costs hardly more than placing one: small steps share the work.
        self._steps_at_once = max(1, PLACED_ROWS // global_batch_size)
        self._placed: _Rows | None = None  # the rows placed last, which other steps may need too

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1; a step may straddle two epochs."""
        return max(1, self.rows_per_epoch // self._rows_per_step)

    def step(self, step: int) -> StepBatch:
        """The batch of `step`, counted from 1, as if the steps before had been taken."""
        rows = self._rows(step)
        stride = self._micro_rows * self._world_size
        offset = self._rank * self._micro_rows
        batches = []
        for first in range(offset, self._rows_per_step, stride):
            chosen = slice(first, first + self._micro_rows)
            splits = [self._streams[index] for index in rows.streams[chosen]]
            batches.append(_make_batch(splits, rows.starts[chosen], self._seq_len, self._packing))
        digest = xxhash.xxh3_64_hexdigest(rows.samples.astype("<i8").tobytes())
        return StepBatch(step, tuple(batches), sum(batch.num_targets for batch in batches), digest)

    def steps(self, start: int, stop: int, prefetch: int) -> Generator[StepBatch, None, None]:
        """The batches of the steps [start, stop); a thread holds up to `prefetch` of them ready.

        The thread ends with the iterator, however that ends; an error in it is raised here.
        """
        return _read_ahead(self.step, start, stop, prefetch)

    def _rows(self, step: int) -> _Rows:
        """The global rows of the step, on every rank the same."""
        first = (step - 1) * self._rows_per_step
        together = self._steps_at_once * self._rows_per_step
        placed = self._placed
        if placed is None or not placed.first <= first < placed.first + len(placed.starts):
            placed = self._placed = self._place(first - first % together, together)
        own = slice(first - placed.first, first - placed.first + self._rows_per_step)
        return _Rows(first, placed.samples[own], placed.streams[own], placed.starts[own])

    def _place(self, first: int, count: int) -> _Rows:
        rows = np.arange(first, first + count, dtype=np.int64)
        if self._mix is None:
            samples, starts = self._windows(rows, self._streams[0])
            return _Rows(first, samples, [0] * count, starts)
        sources, numbers = self._mix.place(rows, self._seed)
        samples, starts = np.empty_like(rows), np.empty_like(rows)
        for index, stream in enumerate(self._streams):
            own = sources == index
            ids, starts[own] = self._windows(numbers[own], stream, index)
            samples[own] = ids * len(self._streams) + index
        return _Rows(first, samples, sources.tolist(), starts)

    def _windows(
        self, numbers: np.ndarray, stream: TokenSplit, *source: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (epoch * R + window) and first positions of a stream's rows: two int64 arrays.

        numbers: of the rows among those of the stream. source: its number in a mix, where each has its own order.
        """
        per_epoch = stream.num_tokens // self._seq_len
        epochs = numbers // per_epoch
        windows = numbers - epochs * per_epoch
        phases = np.zeros_like(numbers)
        for epoch in np.unique(epochs).tolist() if self._shuffle else ():
            own = epochs == epoch
            windows[own] = permute(windows[own], per_epoch, order_key(self._seed, epoch, ORDER, *source))
            phases[own] = order_key(self._seed, epoch, PHASE, *source) % self._seq_len if epoch else 0
        return epochs * per_epoch + windows, (windows * self._seq_len + phases) % stream.num_tokens


def validation_batches(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    packing: Packing,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The rows of the split in order, unshuffled, the last one filled up with eos that is not predicted.

    max_tokens limits them (at least one is read) to rows spread evenly over the split: its first documents alone,
    often of one source, would not speak for it. The micro-batches are the same for every world size and
    dealt out in turn; where they do not come out even, the last one of a rank has no targets.
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
        lengths = np.diff(boundaries)
        positions = (np.arange(rows * seq_len) - np.repeat(boundaries[:-1], lengths)).reshape(rows, seq_len)
    return Batch(
        torch.from_numpy(window[:, :-1].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        tuple(boundaries.tolist()),
        num_targets,
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
    return Batch(tokens, torch.full_like(tokens, IGNORE_INDEX), positions, (0, seq_len), 0)


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
    return Batch(batch.input_ids, batch.labels, batch.position_ids, batch.boundaries, num_targets)


def _read_ahead(
    make: Callable[[int], StepBatch], start: int, stop: int, prefetch: int
) -> Generator[StepBatch, None, None]:
    ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
    ended = threading.Event()

    def put(item: StepBatch | BaseException) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for step in range(start, stop):
                put(make(step))
                if ended.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="batch-reader", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join()
