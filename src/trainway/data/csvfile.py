"""CSV (RFC 4180): quoted fields with newlines, any size, a line number for every fault, and its writer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainway.data.rows import (
    BOM,
    KEPT_BYTES,
    MIB,
    BadRecord,
    BadRow,
    MalformedError,
    Row,
    decode_json,
    too_long,
)
from trainway.errors import DataError

NEVER_CLOSED = "a quoted field begins in this line and is never closed"
AFTER_QUOTE = "text after the closing quote of a field: a quote inside a quoted field is written twice"


def read_csv(
    file: BinaryIO, path: Path, limit: int, json_columns: Collection[str] = ()
) -> Iterator[Row | BadRow]:
    """Stream the rows under the header; a row's line is the one at which it begins.

    An empty cell without quotes is absent from the row; `""` is the empty text. The cells of `json_columns` that
    begin with a bracket are decoded as JSON. Raises DataError when the header is unusable.
    """
    records = _Records(file, limit)
    header: list[str] | None = None
    for record in records:
        try:
            if record.reason:
                raise MalformedError("", record.reason)
            if header is None:
                header = _header(record.cells, path)
                continue
            yield Row(_fields(header, record.cells, json_columns), record.line, b"".join(record.raw))
        except MalformedError as bad:
            if header is None:
                raise DataError(f"{path}:{record.line}: the header cannot be read", bad.reason) from None
            raw = b"".join(record.raw)
            yield BadRow(BadRecord(path, record.line, bad.field, bad.reason), raw, max(record.size, len(raw)))


def csv_line(cells: Sequence[Any]) -> bytes:
    """One line of CSV: None is an empty cell, text is quoted where it must be, anything else is written as JSON."""
    return (",".join(_cell(cell) for cell in cells) + "\r\n").encode("utf-8")


def header_of(path: Path, limit: int = MIB) -> list[str]:
    """The columns of a CSV file. Raises DataError when the header is unusable."""
    from trainway.data.rows import open_data

    with open_data(path) as file:
        for record in _Records(file, limit):
            if record.reason:
                raise DataError(f"{path}:{record.line}: the header cannot be read", record.reason)
            return _header(record.cells, path)
    return []


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if text and text.strip() == text and not any(mark in text for mark in ',"\r\n'):
        return text
    return '"' + text.replace('"', '""') + '"'


def _header(cells: list[bytes | None], path: Path) -> list[str]:
    try:
        names = [(cell or b"").decode("utf-8").strip() for cell in cells]
    except UnicodeDecodeError as error:
        raise MalformedError("", f"not valid UTF-8: {error.reason}") from None
    names = [name or f"column_{number}" for number, name in enumerate(names, 1)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{path}: the header names {name!r} twice", fix="give each column a name of its own"
            )
    return names


def _fields(header: list[str], cells: list[bytes | None], json_columns: Collection[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        fields = f"{len(cells)} field{'s' if len(cells) > 1 else ''}"
        raise MalformedError("", f"has {fields}; the header names {len(header)}")
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if cell is None:
            continue
        try:
            row[name] = text = cell.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedError(name, f"not valid UTF-8 at byte {error.start}") from None
        if name in json_columns and text.lstrip().startswith("["):
            try:
                row[name] = decode_json(text)
            except MalformedError as bad:
                raise MalformedError(name, bad.reason) from None
    return row


@dataclass
class _Record:
    line: int
    cells: list[bytes | None] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    size: int = 0
    reason: str = ""


class _Records:
    """The records of a file, however many lines each takes; blank lines are left out."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._line = 0

    def __iter__(self) -> Iterator[_Record]:
        while line := self._file.readline(self._limit + 3):
            self._line += 1
            if self._line == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            if b'"' not in line and line.endswith(b"\n") and len(line) <= self._limit:
                cells = line[: -2 if line.endswith(b"\r\n") else -1].split(b",")
                yield _Record(self._line, [cell or None for cell in cells], [line])
            else:
                yield self._read(line)

    def _read(self, line: bytes) -> _Record:
        """The record that begins with `line`; what follows it is left to be read next."""
        record = _Record(self._line, raw=[line], size=len(line))
        after_first: tuple[int, int] | None = None
        part: list[bytes] | None = None
        while True:
            if record.size > self._limit + 2:
                return self._skip(record, after_first)
            try:
                part = _scan(line, record.cells, part)
            except MalformedError as bad:
                where = f" (in line {self._line})" if self._line > record.line else ""
                record.reason = bad.reason + where
                return record
            if part is None:
                return record
            after_first = after_first or (self._file.tell(), self._line)
            line = self._file.readline(self._limit + 3)
            if not line:
                return self._unclosed(record.line, record.raw[0], after_first)
            self._line += 1
            record.size += len(line)
            record.raw.append(line)

    def _skip(self, record: _Record, after_first: tuple[int, int] | None) -> _Record:
        """Go to the end of a record that is too long, without holding it."""
        is_open = sum(part.count(b'"') for part in record.raw) % 2 == 1
        ended = record.raw[-1].endswith(b"\n")
        first = record.raw[0]
        record.raw = [b"".join(record.raw)[:KEPT_BYTES]]
        record.cells = []
        record.reason = too_long(self._limit)
        if after_first is None and ended:
            after_first = (self._file.tell(), self._line)
        while is_open or not ended:
            rest = self._file.readline(MIB)
            if not rest:
                # its first line may be the very one that is too long: then there is nothing to go back to
                return self._unclosed(record.line, first, after_first) if is_open and after_first else record
            self._line += ended  # a new line begins
            ended = rest.endswith(b"\n")
            if ended and after_first is None:
                after_first = (self._file.tell(), self._line)
            is_open ^= rest.count(b'"') % 2 == 1
            record.size += len(rest)
        return record

    def _unclosed(self, number: int, first: bytes, after_first: tuple[int, int]) -> _Record:
        """The quote is the fault, not the rows that it swallowed: they are read again, as rows."""
        offset, self._line = after_first
        self._file.seek(offset)
        return _Record(number, raw=[first[:KEPT_BYTES]], size=len(first), reason=NEVER_CLOSED)


def _scan(line: bytes, cells: list[bytes | None], part: list[bytes] | None) -> list[bytes] | None:
    """Append the cells of a line; returns the pieces of a quoted cell that goes on in the next line, or None.

    part: the pieces of the cell that is open at the line's beginning. Raises MalformedError for a stray quote.
    """
    end = len(line) - (2 if line.endswith(b"\r\n") else 1 if line.endswith(b"\n") else 0)
    at = 0
    while True:
        if part is None:
            if line[at : at + 1] != b'"':
                comma = line.find(b",", at, end)
                cells.append(line[at : end if comma < 0 else comma] or None)
                if comma < 0:
                    return None
                at = comma + 1
                continue
            part, at = [], at + 1
        quote = line.find(b'"', at)
        if quote < 0:
            part.append(line[at:])
            return part
        part.append(line[at:quote])
        at = quote + 1
        if line[at : at + 1] == b'"':
            part.append(b'"')
            at += 1
            continue
        cells.append(b"".join(part))
        part = None
        if at == end:
            return None
        if line[at : at + 1] != b",":
            raise MalformedError("", AFTER_QUOTE)
        at += 1
