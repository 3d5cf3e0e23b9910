"""Which documents share a row: best fit decreasing over their lengths alone, and documents in order of length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRows:
    """Rows of whole documents. A slot is a place in the order of descending length: which document of that length
    takes it is for each epoch to say, and the rows stay as they are."""

    slots: np.ndarray  # [documents] int64, row after row
    row_starts: np.ndarray  # [rows + 1] int64, offsets in `slots`
    seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, number: int) -> np.ndarray:
        """The slots of one row."""
        return self.slots[self.row_starts[number] : self.row_starts[number + 1]]


def pack(lengths: np.ndarray, seq_len: int) -> PackedRows:
    """Fill rows of `seq_len` tokens with documents of `lengths` ([documents], each from 1 to seq_len).

    Best fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): the longest document first, each into
    the fullest row that has room for it. Rows are held by the room left in them and documents counted by length, so
    that all of one length go to all rows of one room at once; the result depends on the set of lengths alone.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= seq_len), (
        "a document of no fitting length"
    )
    counts = np.bincount(lengths, minlength=seq_len + 1)
    rooms = _Rooms(seq_len)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room = rooms.tightest(length) or rooms.open(-(-left // (seq_len // length)))
            # After one document, a row that has room for another of this length is the fullest such row.
            each = min(room // length, left)
            left -= each * rooms.fill(room, left // each, each, each * length)
    filled, runs, documents = (
        np.array(record, dtype=np.int64) for record in (rooms.filled, rooms.runs, rooms.documents)
    )
    row_of_slot = np.repeat(filled, np.repeat(documents, runs))
    per_row = np.bincount(row_of_slot, minlength=rooms.num_rows)
    row_starts = np.zeros(rooms.num_rows + 1, dtype=np.int64)
    np.cumsum(per_row, out=row_starts[1:])
    return PackedRows(np.argsort(row_of_slot, kind="stable"), row_starts, seq_len)


def by_length(lengths: np.ndarray, priority: np.ndarray | None = None) -> np.ndarray:
    """[documents] int64: the document that takes each slot.

    priority: a permutation of the documents that decides among those of one length; without it, their own order.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return np.empty(0, dtype=np.int64)
    rank = np.arange(len(lengths)) if priority is None else priority
    return np.argsort((int(lengths.max()) - lengths) * len(lengths) + rank, kind="stable")


def efficiency(num_tokens: int, num_rows: int, seq_len: int) -> float:
    """Share of the rows' positions that hold tokens of documents."""
    return num_tokens / (num_rows * seq_len) if num_rows else 0.0


class _Rooms:
    """Open rows by the room left in them, and a record of every filling, in order."""

    def __init__(self, seq_len: int) -> None:
        self.num_rows = 0
        self.filled: list[int] = []  # a row for each time that documents went into it
        self.runs: list[int] = []  # how many of these entries were made at once, and
        self.documents: list[int] = []  # how many documents went into each of their rows
        self._seq_len = seq_len
        self._rows: dict[int, list[int]] = {}
        self._rooms = 0  # bit r is set while a row has exactly r tokens of room

    def tightest(self, length: int) -> int:
        """The least room of at least `length`; 0 when there is none."""
        bits = self._rooms >> length
        return length + (bits & -bits).bit_length() - 1 if bits else 0

    def open(self, count: int) -> int:
        """Begin new rows; returns their room."""
        self._add(self._seq_len, list(range(self.num_rows, self.num_rows + count)))
        self.num_rows += count
        return self._seq_len

    def fill(self, room: int, most: int, documents: int, tokens: int) -> int:
        """Put `documents` of `tokens` together into each of at most `most` rows of this room; returns how many."""
        rows = self._rows[room]
        taken = rows[-most:]
        del rows[-most:]
        if not rows:
            self._rooms ^= 1 << room
        self._add(room - tokens, taken)
        self.filled += taken
        self.runs.append(len(taken))
        self.documents.append(documents)
        return len(taken)

    def _add(self, room: int, rows: list[int]) -> None:
        self._rows.setdefault(room, []).extend(rows)
        if room:
            self._rooms |= 1 << room
