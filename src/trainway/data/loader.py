"""Batches for training: each step's rows are a pure function of (seed, step), for any number of ranks.

What a row is, a `RowSource` says: a window of a stream of documents, or conversations packed or padded. In a mix each
source is a stream of its own, and trainway.data.mix says whose turn it is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from trainway.data.batch import IGNORE_INDEX, Batch, Packing
from trainway.data.conversation_rows import ConversationRows, conversation_validation
from trainway.data.mix import Mix
from trainway.data.store import TokenSplit
from trainway.data.windows import WindowRows, window_validation
from trainway.errors import ConfigError

__all__ = ["IGNORE_INDEX", "Batch", "Loader", "Packing", "RowSource", "StepBatch", "validation_batches"]

PLACED_ROWS = 256


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimiser step."""

    step: int
    micro_batches: tuple[Batch, ...]
    num_targets: int  # of this rank
    num_tokens: int  # of this rank, filling left out
    sample_hash: str  # xxh3_64 of the step's global sample ids: the same on every rank and world size


class RowSource(Protocol):
    """The rows of one or more streams: where each lies, and the batch of some of them."""

    rows_per_epoch: tuple[int, ...]
    """Of each stream."""

    def place(self, stream: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids, unique per (epoch, row), and places of a stream's rows, by their numbers in the run: int64 arrays."""

    def arrange(self, streams: Sequence[int], places: np.ndarray) -> np.ndarray | None:
        """The order in which a step's rows are dealt to micro-batches and ranks; None: as they come."""

    def batch(self, streams: Sequence[int], places: np.ndarray) -> Batch:
        """The micro-batch of the rows at `places`, row i of the stream streams[i]."""


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of the run: what each is called and where it is read."""

    first: int  # number of the first row
    samples: np.ndarray  # [rows] int64 ids, unique per (source, epoch, row)
    streams: list[int]  # of each row: which stream it is read from
    places: np.ndarray  # [rows] int64, where in those streams


class Loader:
    """The training batches of one rank.

    streams: the training split, or, with a `mix`, one stream for each of its sources. Streams with a mask hold
    conversations; all others are read in windows.
    Raises ConfigError for sizes that do not divide and for a packing of the other kind, DataError when a stream has
    no row.
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
        streams = (streams,) if isinstance(streams, TokenSplit) else tuple(streams)
        assert len(streams) == (len(mix.names) if mix else 1)
        kind = ConversationRows if streams[0].has_mask else WindowRows
        self._source: RowSource = kind(
            streams, seq_len=seq_len, packing=packing, seed=seed, shuffle=shuffle, mixed=mix is not None
        )
        assert mix is None or mix.rows == self._source.rows_per_epoch
        self._rows_per_step = global_batch_size
        self._micro_rows = micro_batch_size
        self._seed = seed
        self._mix = mix
        self._rank = rank
        self._world_size = world_size
        self.rows_per_epoch = mix.rows_per_epoch if mix else self._source.rows_per_epoch[0]
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
        streams, places = rows.streams, rows.places
        order = self._source.arrange(streams, places)
        if order is not None:
            streams, places = [streams[index] for index in order.tolist()], places[order]
        stride = self._micro_rows * self._world_size
        offset = self._rank * self._micro_rows
        batches = []
        for first in range(offset, self._rows_per_step, stride):
            chosen = slice(first, first + self._micro_rows)
            batches.append(self._source.batch(streams[chosen], places[chosen]))
        digest = xxhash.xxh3_64_hexdigest(rows.samples.astype("<i8").tobytes())
        targets, tokens = (
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
        )
        return StepBatch(step, tuple(batches), targets, tokens, digest)

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
        if placed is None or not placed.first <= first < placed.first + len(placed.places):
            placed = self._placed = self._place(first - first % together, together)
        own = slice(first - placed.first, first - placed.first + self._rows_per_step)
        return _Rows(first, placed.samples[own], placed.streams[own], placed.places[own])

    def _place(self, first: int, count: int) -> _Rows:
        rows = np.arange(first, first + count, dtype=np.int64)
        if self._mix is None:
            samples, places = self._source.place(0, rows)
            return _Rows(first, samples, [0] * count, places)
        sources, numbers = self._mix.place(rows, self._seed)
        samples, places = np.empty_like(rows), np.empty_like(rows)
        num_streams = len(self._mix.names)
        for index in range(num_streams):
            own = sources == index
            ids, places[own] = self._source.place(index, numbers[own])
            samples[own] = ids * num_streams + index
        return _Rows(first, samples, sources.tolist(), places)


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
    """The rows of the split in order, unshuffled: of conversations each once, else windows without a gap.

    max_tokens limits them (at least one is read) to rows spread evenly over the split: its first documents alone,
    often of one source, would not speak for it. The micro-batches are the same for every world size and
    dealt out in turn; where they do not come out even, the last one of a rank has no targets.
    Raises DataError for a split in which there is nothing to predict.
    """
    read = conversation_validation if split.has_mask else window_validation
    return read(
        split,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        packing=packing,
        max_tokens=max_tokens,
        rank=rank,
        world_size=world_size,
    )


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
