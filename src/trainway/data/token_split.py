"""The documents of a split as one stream of tokens, read by position, wherever its parts lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Part:
    """Some of a split's documents, in one set of files."""

    tokens: np.ndarray  # [part tokens] uint16 or uint32
    starts: np.ndarray  # [part documents + 1] int64, offsets within the part
    first: int  # position of the part's first token in the split
    mask: np.ndarray | None = None  # [part tokens] uint8, 1 where the token is a target


class TokenSplit:
    """The documents of one split as one stream of tokens; each is [bos] + its tokens + [eos], or a conversation.

    `pad_id` fills rows up; without one of its own it is `eos_id`.
    """

    def __init__(
        self, parts: Sequence[Part], eos_id: int, name: str = "train", pad_id: int | None = None
    ) -> None:
        self.name = name
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.num_tokens = sum(len(part.tokens) for part in parts)
        self.num_documents = sum(len(part.starts) - 1 for part in parts)
        self._parts = tuple(parts)
        self._only = parts[0] if len(parts) == 1 else None
        self._firsts = np.array([part.first for part in parts], dtype=np.int64)

    @classmethod
    def from_arrays(
        cls,
        tokens: np.ndarray,
        starts: np.ndarray,
        eos_id: int,
        name: str = "train",
        *,
        mask: np.ndarray | None = None,
        pad_id: int | None = None,
    ) -> TokenSplit:
        """A split in memory. tokens: [T] unsigned; starts: [documents + 1] offsets, the last one T; mask: [T]."""
        return cls([Part(tokens, starts.astype(np.int64), 0, mask)], eos_id, name, pad_id)

    @property
    def has_mask(self) -> bool:
        """Whether the documents are conversations, of which only some tokens are targets."""
        return bool(self._parts) and self._parts[0].mask is not None

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens at the positions [start, stop), which must lie within the split; a view where possible."""
        if self._only is not None:
            return self._only.tokens[start:stop]
        pieces = [
            part.tokens[max(start - part.first, 0) : stop - part.first] for part in self._within(start, stop)
        ]
        return np.concatenate(pieces) if pieces else self._parts[0].tokens[:0]

    def mask(self, start: int, stop: int) -> np.ndarray:
        """uint8 at the positions [start, stop), within one document: 1 where the token is a target."""
        part = self._only or self._within(start, stop)[0]
        assert part.mask is not None
        return part.mask[start - part.first : stop - part.first]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in the split, sorted int64, of the documents that begin within [start, stop)."""
        if self._only is not None:
            return _starts_between(self._only.starts, start, stop)
        pieces = [
            _starts_between(part.starts, start - part.first, stop - part.first) + part.first
            for part in self._within(start, stop)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def documents(self, tokens: int = 4 << 20) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """The stream in runs of whole documents, of about `tokens` tokens each.

        Yields (tokens, lengths of the documents, mask of the tokens if there is one).
        """
        for part in self._parts:
            done = 0
            while done < len(part.starts) - 1:
                first = int(part.starts[done])
                stop = max(int(np.searchsorted(part.starts, first + tokens, "right")) - 1, done + 1)
                starts = part.starts[done : stop + 1]
                own = slice(first, int(starts[-1]))
                yield part.tokens[own], np.diff(starts), None if part.mask is None else part.mask[own]
                done = stop

    def document_numbers(self) -> TokenSplit:
        """The same documents, with the number of the document in place of each token: rows of it say whose theirs are."""
        return _DocumentNumbers(self._parts, self.eos_id, self.name)

    def _within(self, start: int, stop: int) -> tuple[Part, ...]:
        low = int(np.searchsorted(self._firsts, start, "right")) - 1
        high = int(np.searchsorted(self._firsts, stop, "left"))
        return self._parts[max(low, 0) : high]


class _DocumentNumbers(TokenSplit):
    def tokens(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int64: of each position the number of its document, from 0."""
        return self._all_starts.searchsorted(np.arange(start, stop), "right") - 1

    @cached_property
    def _all_starts(self) -> np.ndarray:
        return self.document_starts(0, self.num_tokens)


def _starts_between(starts: np.ndarray, start: int, stop: int) -> np.ndarray:
    # The last offset is the part's end, not a document's start.
    low, high = starts[:-1].searchsorted((start, stop))
    return starts[low:high]
