"""Rows of a teacher for training: each step's prompts and answers are a pure function of (seed, step), on every rank.

A row of the store is p + t, the mask naming t; `teacher.py` says what each holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from trainway.data.chat import UNLIMITED
from trainway.data.conversation_rows import ConversationRows
from trainway.data.mix import Mix
from trainway.data.row_order import RowOrder
from trainway.data.store import TokenSplit


class TeacherRow(NamedTuple):
    """A prompt and what the teacher answered."""

    id: int
    """Unique per (source, epoch, row)."""
    prompt: np.ndarray
    """[P] int32, at least one token."""
    response: np.ndarray
    """[T] int32, at least one token, the end of the turn included."""
    ended: bool
    """Whether that end is there; it is not where the answer was cut."""


class TeacherBatch(NamedTuple):
    """All rows of an optimiser step, over all ranks."""

    step: int
    rows: tuple[TeacherRow, ...]
    sample_hash: str
    """xxh3_64 of the rows' ids: the same on every rank and world size."""


class TeacherSource(Protocol):
    """Where the loop takes a stage's rows from."""

    def step(self, step: int) -> TeacherBatch:
        """The rows of `step`, counted from 1."""


class TeacherLoader:
    """The rows of each step, the same on every rank.

    streams: the training split, or, with a `mix`, one stream for each of its sources. end_token: what ends an
    answer, see `teacher.end_of_turn`. Every row comes once an epoch, in an order of its own with `shuffle`.
    Raises DataError when a stream has no row.
    """

    def __init__(
        self,
        streams: TokenSplit | Sequence[TokenSplit],
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        end_token: int,
        mix: Mix | None = None,
    ) -> None:
        streams = (streams,) if isinstance(streams, TokenSplit) else tuple(streams)
        self._documents = _documents(streams, seed=seed, shuffle=shuffle, mixed=mix is not None)
        self._order = RowOrder(self._documents, rows_per_step=prompts_per_step, seed=seed, mix=mix)
        self._end_token = end_token
        self._rows_per_step = prompts_per_step
        self.rows_per_epoch = self._order.rows_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1; a step may straddle two epochs."""
        return self._order.steps_per_epoch

    def step(self, step: int) -> TeacherBatch:
        """The rows of `step`, counted from 1, as if the steps before had been taken."""
        order = self._order.step(step)
        places = zip(order.samples.tolist(), order.streams, order.places.tolist(), strict=True)
        rows = tuple(
            _row(self._documents, stream, place, sample, self._end_token) for sample, stream, place in places
        )
        return TeacherBatch(step, rows, order.sample_hash)

    def longest(self, step: int) -> TeacherBatch:
        """The longest rows that there are, prompt and answer together, for `step`; their ids are their places."""
        streams, places = self._documents.longest(self._rows_per_step)
        rows = tuple(
            _row(self._documents, stream, place, place, self._end_token)
            for stream, place in zip(streams, places.tolist(), strict=True)
        )
        return TeacherBatch(step, rows, "")


def validation_rows(split: TokenSplit, count: int, *, end_token: int) -> list[TeacherRow]:
    """`count` rows of the split, or all where it has no more, in its order and spread evenly over it: its first rows,
    often of one source, would not speak for it. Their ids are their numbers in the split.

    Raises DataError for a split without rows.
    """
    documents = _documents([split], seed=0, shuffle=False, mixed=False)
    whole = documents.rows_per_epoch[0]
    wanted = min(count, whole)
    places = np.arange(wanted, dtype=np.int64) * whole // wanted
    return [_row(documents, 0, place, place, end_token) for place in places.tolist()]


def _documents(streams: Sequence[TokenSplit], *, seed: int, shuffle: bool, mixed: bool) -> ConversationRows:
    return ConversationRows(
        streams, seq_len=UNLIMITED, packing="none", seed=seed, shuffle=shuffle, mixed=mixed
    )


def _row(documents: ConversationRows, stream: int, place: int, sample: int, end_token: int) -> TeacherRow:
    tokens, trained = documents.document(stream, place)
    tokens = tokens.astype(np.int32)
    # the answer is the last run of what is trained: behind the last token that is not
    begin = int(np.flatnonzero(trained == 0)[-1]) + 1
    return TeacherRow(sample, tokens[:begin], tokens[begin:], bool(tokens[-1] == end_token))
