"""What is known of the copies at a target: size, hash and ETag of each, kept beside them and trusted only as far as
the store's own listing bears it out."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainway.errors import DataError
from trainway.storage.address import is_safe_name
from trainway.storage.store import Content, Entry, Store

LEDGER = ".trainway.json"
FORMAT = 1
MAX_BYTES = 64 << 20
SAVE_EVERY_S = 5.0
"""What a killed copy may have to look at again; a file of more than SAVE_BYTES is noted at once."""
SAVE_BYTES = 64 << 20


@dataclass(frozen=True)
class Copy:
    """One object: the xxh3_128 of the bytes that were sent, and how the store listed it then."""

    size: int
    xxh3: str
    etag: str


@dataclass
class Ledger:
    """The copies at one target. `complete`: a tree that was copied at once is all there."""

    id: str
    """Of the run or tree; a directory that does not know it has another one."""
    complete: bool = False
    abandoned: list[int] = field(default_factory=list)
    """Steps whose checkpoints there are of a past that the run has turned away from."""
    copies: dict[str, Copy] = field(default_factory=dict)
    generation: int = 0
    """How often the run was brought back from here and went on: the newest of its directories alone writes here."""
    writer: str = ""
    """Which of the directories of one generation; empty for the first."""
    entry: Entry | None = None
    """How the store has this ledger itself: another one there is another writer's."""
    _saved: float = 0.0
    _unsaved: bool = True

    @classmethod
    def new(cls) -> Ledger:
        return cls(secrets.token_hex(8))

    def holds(self, name: str, size: int, xxh3: str, listed: Mapping[str, Entry]) -> bool:
        """Whether the object of that content is there, by this note and by the store's listing of now."""
        copy = self.copies.get(name)
        return (
            copy == Copy(size, xxh3, copy.etag) and listed.get(name) == Entry(size, copy.etag)
            if copy
            else False
        )

    def put(self, store: Store, name: str, content: Content) -> Copy:
        """Make the object and note it."""
        entry = store.put(name, content)
        copy = self.note(name, entry, content.xxh3)
        if entry.size >= SAVE_BYTES or time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save(store)
        return copy

    def note(self, name: str, entry: Entry, xxh3: str) -> Copy:
        copy = self.copies[name] = Copy(entry.size, xxh3, entry.etag)
        self._unsaved = True
        return copy

    def forget(self, names: list[str]) -> None:
        for name in names:
            self._unsaved |= self.copies.pop(name, None) is not None

    def change(self, **values: Any) -> None:
        for key, value in values.items():
            self._unsaved |= getattr(self, key) != value
            setattr(self, key, value)

    def save(self, store: Store) -> None:
        """Write it beside the copies, if it says anything new."""
        if not self._unsaved:
            return
        body = {
            "format": FORMAT,
            "id": self.id,
            "complete": self.complete,
            "abandoned": self.abandoned,
            "generation": self.generation,
            "writer": self.writer,
            "files": {name: [copy.size, copy.xxh3, copy.etag] for name, copy in sorted(self.copies.items())},
        }
        self.entry = store.put(LEDGER, Content.of_bytes((json.dumps(body, indent=1) + "\n").encode()))
        self._saved, self._unsaved = time.monotonic(), False


def read_ledger(store: Store, where: str) -> Ledger | None:
    """The ledger at a target; None when there is none. Raises DataError for one that is damaged or not ours."""
    data = store.read(LEDGER, MAX_BYTES)
    if data is None:
        return None
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise ValueError
        copies = {
            name: Copy(int(size), str(hash_), str(etag))
            for name, (size, hash_, etag) in body["files"].items()
        }
        found = Ledger(
            str(body["id"]),
            body["complete"] is True,
            [int(step) for step in body["abandoned"]],
            copies,
            int(body.get("generation", 0)),
            str(body.get("writer", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{where}/{LEDGER}: damaged",
            "it is no list of copies of this version",
            "remove this one object: what it lists is looked at anew",
        ) from None
    if unsafe := next((name for name in copies if not is_safe_name(name)), None):
        raise DataError(
            f"{where}/{LEDGER}: unsafe name {unsafe!r:.80}", "it is no plain path", "do not use this copy"
        )
    found._unsaved = False
    return found
