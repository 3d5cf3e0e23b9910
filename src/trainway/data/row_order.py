"""Which rows a step reads: a pure function of (seed, step), the same on every rank, of one stream or of a mix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from trainway.data.mix import Mix

PLACED_ROWS = 256


class Placing(Protocol):
    """The rows of one or more streams, by their numbers in the run."""

    rows_per_epoch: tuple[int, ...]
    """Of each stream."""

    def place(self, stream: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids, unique per (epoch, row), and places of a stream's rows, by their numbers in the run: int64 arrays."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of the run: what each is called and where it is read."""

    first: int  # number of the first row
    samples: np.ndarray  # [rows] int64 ids, unique per (source, epoch, row)
    streams: list[int]  # of each row: which stream it is read from
    places: np.ndarray  # [rows] int64, where in those streams

    @property
    def sample_hash(self) -> str:
        """xxh3_64 of the ids: the same on every rank and world size."""
        return xxhash.xxh3_64_hexdigest(self.samples.astype("<i8").tobytes())


class RowOrder:
    """Deals the rows of `source` to steps of `rows_per_step`; in a `mix` each source is a stream of its own."""

    def __init__(self, source: Placing, *, rows_per_step: int, seed: int, mix: Mix | None = None) -> None:
        assert len(source.rows_per_epoch) == (len(mix.names) if mix else 1)
        assert mix is None or mix.rows == source.rows_per_epoch
        self._source = source
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._mix = mix
        self.rows_per_epoch = mix.rows_per_epoch if mix else source.rows_per_epoch[0]
        # Placing many rows costs hardly more than placing one: small steps share the work.
        self._steps_at_once = max(1, PLACED_ROWS // rows_per_step)
        self._placed: Rows | None = None  # the rows placed last, which other steps may need too

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1; a step may straddle two epochs."""
        return max(1, self.rows_per_epoch // self._rows_per_step)

    def step(self, step: int) -> Rows:
        """The global rows of `step`, counted from 1, as if the steps before had been taken."""
        first = (step - 1) * self._rows_per_step
        together = self._steps_at_once * self._rows_per_step
        placed = self._placed
        if placed is None or not placed.first <= first < placed.first + len(placed.places):
            placed = self._placed = self._place(first - first % together, together)
        own = slice(first - placed.first, first - placed.first + self._rows_per_step)
        return Rows(first, placed.samples[own], placed.streams[own], placed.places[own])

    def _place(self, first: int, count: int) -> Rows:
        rows = np.arange(first, first + count, dtype=np.int64)
        if self._mix is None:
            samples, places = self._source.place(0, rows)
            return Rows(first, samples, [0] * count, places)
        sources, numbers = self._mix.place(rows, self._seed)
        samples, places = np.empty_like(rows), np.empty_like(rows)
        num_streams = len(self._mix.names)
        for index in range(num_streams):
            own = sources == index
            ids, places[own] = self._source.place(index, numbers[own])
            samples[own] = ids * num_streams + index
        return Rows(first, samples, sources.tolist(), places)
