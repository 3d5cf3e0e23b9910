"""Exact duplicates: remembers the 128-bit hash of everything seen, in some 30 bytes each."""

from __future__ import annotations

from array import array

import xxhash

TABLES = 256
_FIRST_SLOTS = 16
_MAX_LOAD = 0.8


class Deduplicator:
    """Tells whether content was seen before; the first one is the one to keep.

    By xxh3_128: of 10 billion different texts, two share a hash with a probability below 1e-18. Memory: 20 to 30
    bytes per distinct content, in small tables that grow one at a time, so that growing needs little more.
    """

    def __init__(self) -> None:
        self.distinct = 0
        self.duplicates = 0
        self._tables = [_Table() for _ in range(TABLES)]

    def is_new(self, content: bytes) -> bool:
        """True the first time that this content is given."""
        digest = xxhash.xxh3_128_intdigest(content)
        if self._tables[digest % TABLES].add(digest):
            self.distinct += 1
            return True
        self.duplicates += 1
        return False

    @property
    def num_bytes(self) -> int:
        """Memory held by the hashes."""
        return sum(table.num_bytes for table in self._tables)


class _Table:
    """A set of 128-bit numbers: open addressing over two arrays of 64 bits. Zero marks a free slot."""

    def __init__(self) -> None:
        self._size = _FIRST_SLOTS
        self._used = 0
        self._high = array("Q", bytes(8 * self._size))
        self._low = array("Q", bytes(8 * self._size))

    def add(self, digest: int) -> bool:
        high, low = digest >> 64, digest & (2**64 - 1) or 1
        if not self._insert(high, low):
            return False
        self._used += 1
        if self._used > _MAX_LOAD * self._size:
            self._grow()
        return True

    @property
    def num_bytes(self) -> int:
        return 16 * self._size

    def _insert(self, high: int, low: int) -> bool:
        lows, highs, size = self._low, self._high, self._size
        slot = high % size
        while found := lows[slot]:
            if found == low and highs[slot] == high:
                return False
            slot = slot + 1 if slot + 1 < size else 0
        lows[slot], highs[slot] = low, high
        return True

    def _grow(self) -> None:
        highs, lows = self._high, self._low
        self._size = self._size * 3 // 2
        self._high = array("Q", bytes(8 * self._size))
        self._low = array("Q", bytes(8 * self._size))
        for high, low in zip(highs, lows, strict=True):
            if low:
                self._insert(high, low)
