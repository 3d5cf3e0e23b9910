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

from trainway.data.batch import IGNORE_INDEX, Batch, Packing
from trainway.data.conversation_rows import ConversationRows, conversation_validation
from trainway.data.mix import Mix
from trainway.data.row_order import Placing, RowOrder
from trainway.data.store import TokenSplit
from trainway.data.windows import WindowRows, window_validation
from trainway.errors import ConfigError

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Loader",
    "Packing",
    "RowSource",
    "StepBatch",
    "StepSource",
    "validation_batches",
]


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimiser step."""

    step: int
    micro_batches: tuple[Batch, ...]
    num_targets: int  # of this rank
    num_tokens: int  # of this rank, filling left out
    sample_hash: str  # xxh3_64 of the step's global sample ids: the same on every rank and world size


class StepSource(Protocol):
    """Where a loop takes its batches from."""

    def steps(self, start: int, stop: int, prefetch: int) -> Generator[StepBatch, None, None]:
        """The batches of the steps [start, stop), up to `prefetch` of them made ahead."""


class RowSource(Placing, Protocol):
    """The rows of one or more streams: where each lies, and the batch of some of them."""

    def arrange(self, streams: Sequence[int], places: np.ndarray) -> np.ndarray | None:
        """The order in which a step's rows are dealt to micro-batches and ranks; None: as they come."""

    def longest(self, count: int) -> tuple[list[int], np.ndarray]:
        """Streams and places of the `count` rows of most tokens, longest first; all anew where there are fewer."""

    def batch(self, streams: Sequence[int], places: np.ndarray) -> Batch:
        """The micro-batch of the rows at `places`, row i of the stream streams[i]."""


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
        kind = ConversationRows if streams[0].has_mask else WindowRows
        self._source: RowSource = kind(
            streams, seq_len=seq_len, packing=packing, seed=seed, shuffle=shuffle, mixed=mix is not None
        )
        self._order = RowOrder(self._source, rows_per_step=global_batch_size, seed=seed, mix=mix)
        self._rows_per_step = global_batch_size
        self._micro_rows = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self.rows_per_epoch = self._order.rows_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1; a step may straddle two epochs."""
        return self._order.steps_per_epoch

    def step(self, step: int) -> StepBatch:
        """The batch of `step`, counted from 1, as if the steps before had been taken."""
        rows = self._order.step(step)
        streams, places = rows.streams, rows.places
        order = self._source.arrange(streams, places)
        if order is not None:
            streams, places = [streams[index] for index in order.tolist()], places[order]
        return self._dealt(step, streams, places, rows.sample_hash)

    def longest(self, step: int) -> StepBatch:
        """A batch for `step` of the longest rows that there are: what takes most memory, whenever it comes."""
        streams, places = self._source.longest(self._rows_per_step)
        return self._dealt(step, streams, places, "")

    def _dealt(self, step: int, streams: Sequence[int], places: np.ndarray, sample_hash: str) -> StepBatch:
        """This rank's share of a step's rows: a micro-batch to each rank in turn."""
        stride = self._micro_rows * self._world_size
        offset = self._rank * self._micro_rows
        batches = []
        for first in range(offset, self._rows_per_step, stride):
            chosen = slice(first, first + self._micro_rows)
            batches.append(self._source.batch(streams[chosen], places[chosen]))
        targets, tokens = (
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
        )
        return StepBatch(step, tuple(batches), targets, tokens, sample_hash)

    def steps(self, start: int, stop: int, prefetch: int) -> Generator[StepBatch, None, None]:
        """The batches of the steps [start, stop); a thread holds up to `prefetch` of them ready.

        The thread ends with the iterator, however that ends; an error in it is raised here.
        """
        return _read_ahead(self.step, start, stop, prefetch)


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
