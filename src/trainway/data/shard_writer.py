"""One directory of shards while it is written: the shard in hand, its hash, and the way back to the last commit."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import asdict, dataclass, field
from io import FileIO
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, Literal

import xxhash

from trainway.errors import DataError
from trainway.files import disk_faults, fsync_directory

DRAIN_BYTES = 1 << 20
"""Text is handed to the disk, the hash and gzip in blocks of about this size."""
GZIP_LEVEL = 1
GZIP_WINDOW = 31
"""A gzip header with neither time nor name: equal text gives equal bytes."""

_RARE = bytes(set(range(32)) - set(b"\n\r\t"))
_ESCAPES = ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t"))
_ANY_SHARD = re.compile(r"\.?shard-(\d{5,})\.(txt|jsonl)(\.gz)?(\.partial)?")
_LEFTOVER = re.compile(r"(manifest|\.sources)\.json\.tmp-[0-9a-f]{8}")


@dataclass(frozen=True)
class Tail:
    """What a commit keeps of a shard that is not complete: its first `bytes` bytes, with their hash."""

    lines: int = 0
    bytes: int = 0
    text_bytes: int = 0
    line_breaks: int = 0
    hash: str = ""


@dataclass(frozen=True)
class Written:
    """What one directory holds at a commit."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    """In order: {"file", "lines", "bytes", "hash"} (xxh3_128)."""
    text_bytes: int = 0
    """Of the complete shards, before compression, line ends included."""
    line_breaks: int = 0
    """Line breaks inside documents that became spaces, in the complete shards."""
    tail: Tail = Tail()

    def totals(self) -> dict[str, int]:
        """Sums over the complete shards."""
        return {
            "shards": len(self.shards),
            "lines": sum(shard["lines"] for shard in self.shards),
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "text_bytes": self.text_bytes,
            "line_breaks_replaced": self.line_breaks,
        }


class ShardWriter:
    """Appends documents to shards of one directory, from a commit on.

    A shard in the making has a hidden name; it is hashed as it is written, and renamed when it is complete.
    Raises EnvironmentFault when the disk is full, read-only or failing, DataError for a damaged tail.
    """

    _partial: Path
    _file: FileIO | None
    _gzip_stream: Any  # zlib's compressor has no name to annotate with
    _pending: list[bytes]

    def __init__(
        self, folder: Path, written: Written, *, style: Literal["text", "jsonl"], gzip: bool
    ) -> None:
        self.folder = folder
        self._is_text = style == "text"
        self._gzip = gzip
        self._suffix = (".txt" if self._is_text else ".jsonl") + (".gz" if gzip else "")
        self._shards = list(written.shards)
        self._text_bytes = written.text_bytes
        self._line_breaks = written.line_breaks
        self.total_lines = sum(shard["lines"] for shard in written.shards) + written.tail.lines
        self._begin()
        self._resume(written.tail)

    def add(self, text: str, data: bytes) -> None:
        """Append a document; `data` is `text` as UTF-8."""
        if not self._is_text:
            data = b'{"text": ' + json_string(text, data) + b"}"
        elif b"\n" in data or b"\r" in data:
            data = self._one_line(data)
        self._pending.append(data)
        self.lines += 1
        self.total_lines += 1
        self._pending_bytes += len(data) + 1
        if self._pending_bytes >= DRAIN_BYTES:
            self._drain()

    def flush(self) -> None:
        """Bring all of the shard in hand to the disk, so that a commit may refer to it. Ends a gzip member."""
        self._drain()
        with disk_faults(self._partial):
            if self._gzip_stream is not None:
                self._write(self._gzip_stream.flush())
                self._gzip_stream = None
            if self._file is not None:
                os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Complete the shard in hand under its final name; nothing happens when it holds no line."""
        if not self.lines:
            return
        self.flush()
        assert self._file is not None
        name = self._name(len(self._shards))
        with disk_faults(self._partial):
            self._file.close()
            os.replace(self._partial, self.folder / name)
            fsync_directory(self.folder)
        self._shards.append(
            {"file": name, "lines": self.lines, "bytes": self._bytes, "hash": self._digest.hexdigest()}
        )
        self._text_bytes += self._shard_text_bytes
        self._line_breaks += self._shard_line_breaks
        self._begin()

    def written(self) -> Written:
        """The state to commit; `flush` or `finish` comes before."""
        assert not self._pending and self._gzip_stream is None
        digest = self._digest.hexdigest() if self.lines else ""
        tail = Tail(self.lines, self._bytes, self._shard_text_bytes, self._shard_line_breaks, digest)
        return Written(list(self._shards), self._text_bytes, self._line_breaks, tail)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._file = None
        self._gzip_stream = None
        self._digest = xxhash.xxh3_128()
        self._pending = []
        self._pending_bytes = 0
        self.lines = 0
        self._bytes = 0
        self._shard_text_bytes = 0
        self._shard_line_breaks = 0
        self._partial = self.folder / f".{self._name(len(self._shards))}.partial"

    def _resume(self, tail: Tail) -> None:
        if not tail.bytes:
            return
        with open(self._partial, "rb") as file:
            while block := file.read(DRAIN_BYTES):
                self._digest.update(block)
        if self._digest.hexdigest() != tail.hash:
            raise _damaged(self._partial, f"its first {tail.bytes} bytes are not the ones that were written")
        self.lines, self._bytes = tail.lines, tail.bytes
        self._shard_text_bytes, self._shard_line_breaks = tail.text_bytes, tail.line_breaks
        with disk_faults(self._partial):
            self._file = open(self._partial, "ab", buffering=0)  # noqa: SIM115 - closed by finish or close

    def _name(self, number: int) -> str:
        return f"shard-{number:05d}{self._suffix}"

    def _one_line(self, data: bytes) -> bytes:
        data = data.strip(b"\r\n")
        if b"\r" in data:  # a reader takes a \r at the end of a line for part of its end
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        breaks = data.count(b"\n")
        self._shard_line_breaks += breaks
        return data.replace(b"\n", b" ") if breaks else data

    def _drain(self) -> None:
        if not self._pending:
            return
        self._pending.append(b"")
        block = b"\n".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self._shard_text_bytes += len(block)
        with disk_faults(self._partial):
            if self._file is None:
                self._file = open(self._partial, "wb", buffering=0)  # noqa: SIM115 - closed by finish or close
            if self._gzip:
                if self._gzip_stream is None:
                    self._gzip_stream = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_WINDOW)
                block = self._gzip_stream.compress(block)
            self._write(block)

    def _write(self, block: bytes) -> None:
        assert self._file is not None
        rest = memoryview(block)
        while rest:  # an unbuffered write may take a part
            rest = rest[self._file.write(rest) :]
        self._digest.update(block)
        self._bytes += len(block)


def json_string(text: str, data: bytes) -> bytes:
    """`text` as a JSON string in UTF-8, unescaped where JSON allows; `data` is `text` as UTF-8."""
    if len(data.translate(None, _RARE)) != len(data):
        return encode_basestring(text).encode()
    for character, escape in _ESCAPES:  # three times as fast as the loop over characters above
        data = data.replace(character, escape)
    return b'"' + data + b'"'


def is_leftover(name: str) -> bool:
    """Whether a file is what a process that was killed left of an atomic write of ours."""
    return _LEFTOVER.fullmatch(name) is not None


def return_to(folder: Path, written: Written) -> None:
    """Bring a directory back to a commit: what was written after it goes, its tail stays.

    Raises DataError when the tail is missing or too short, EnvironmentFault when the disk fails.
    """
    next_number = len(written.shards)
    # a crash between the renaming of a shard and the commit leaves it complete: its beginning is the tail
    tail: list[Path] = []
    stale: list[Path] = []
    for path in sorted(folder.iterdir()):
        match = _ANY_SHARD.fullmatch(path.name)
        if match and int(match[1]) == next_number:
            tail.append(path)
        elif match and match[4]:
            stale.append(path)
    with disk_faults(folder):
        stale += (path for path in folder.iterdir() if is_leftover(path.name))
        for path in stale if written.tail.bytes else stale + tail:
            path.unlink()
        if not written.tail.bytes:
            return
        if len(tail) != 1 or tail[0].stat().st_size < written.tail.bytes:
            named = f"{folder}: the shard in hand (shard-{next_number:05d})"
            raise _damaged(named, f"the manifest counts on {written.tail.bytes} bytes of it")
        partial = folder / f".{tail[0].name.removeprefix('.').removesuffix('.partial')}.partial"
        os.replace(tail[0], partial)
        os.truncate(partial, written.tail.bytes)


def written_to_json(written: Written) -> dict[str, Any]:
    """All but the shards themselves, which the manifest lists."""
    return {
        "shards": len(written.shards),
        "text_bytes": written.text_bytes,
        "line_breaks": written.line_breaks,
        "tail": asdict(written.tail),
    }


def written_from_json(value: dict[str, Any], shards: list[dict[str, Any]]) -> Written:
    """Raises KeyError or TypeError for what `written_to_json` never wrote."""
    return Written(
        shards[: value["shards"]], value["text_bytes"], value["line_breaks"], Tail(**value["tail"])
    )


def _damaged(what: object, why: str) -> DataError:
    return DataError(
        f"{what} is damaged", why, "restore it, or remove the directories of this run and shard anew"
    )
