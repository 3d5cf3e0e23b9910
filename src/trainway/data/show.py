"""Shows rows to a person: field by field, control characters made visible, token by token where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trainway.config.schema import DataConfig
from trainway.data.printable import printable
from trainway.data.quarantine import quarantined
from trainway.data.records import FieldNames, Kind, Message, Record, read_records
from trainway.data.rows import BadRow, file_kind
from trainway.data.validate import find_rows
from trainway.errors import DataError


@dataclass
class Shown:
    """One part of a row: a turn or a text, with its tokens where a tokenizer was given."""

    label: str
    text: str
    extra: dict[str, Any] = field(default_factory=dict)
    tokens: list[str] | None = None


@dataclass
class ShownRow:
    """One row as it is shown. `error` says what is wrong with a bad one."""

    source: Path
    line: int
    shape: str = ""
    parts: list[Shown] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def num_characters(self) -> int:
        return sum(len(part.text) for part in self.parts)


def inspect_rows(
    path: str,
    *,
    line: int | None = None,
    first: int = 1,
    config: DataConfig | None = None,
    names: FieldNames | None = None,
    kind: Kind = "auto",
    tokenizer: Path | None = None,
) -> list[ShownRow]:
    """The row at `line` (its number as validation gives it; of Parquet, the row's number), or the first few.

    Raises DataError for a file that cannot be read or has no such row.
    """
    config = config or DataConfig()
    (source, *_) = find_rows([path], config)
    split = _splitter(tokenizer) if tokenizer else None
    rows = read_records(source, config.max_document_mib, names=names, kind=kind)
    if line is None:
        return [_shown(row, source, split) for row in islice(rows, first)]
    last = 0
    for row in rows:
        at = row.record.line if isinstance(row, BadRow) else row.line
        if at == line:
            return [_shown(row, source, split)]
        if at > line:
            break
        last = at
    unit = "row" if file_kind(source) == "parquet" else "line"
    raise DataError(
        f"{source}: no row begins in {unit} {line:,}",
        f"the last one before it is {unit} {last:,}",
        "name another",
    )


def render(row: ShownRow) -> Iterator[str]:
    """The lines that show a row."""
    where = f"{printable(str(row.source))}:{row.line}"
    if row.error:
        yield f"{where}  bad: {printable(row.error)}"
    else:
        turns = f", {len(row.parts)} turns" if row.shape in ("messages", "teacher") else ""
        yield f"{where}  {row.shape}{turns}, {row.num_characters:,} characters"
    for part in row.parts:
        count = f", {len(part.tokens):,} tokens" if part.tokens is not None else ""
        yield f"── {printable(part.label)} ({len(part.text):,} characters{count})"
        yield printable(part.text) if part.tokens is None else "│".join(map(_token, part.tokens))
        for name, value in part.extra.items():
            yield f"   {printable(name)}: {_value(value)}"
    for name, value in row.other.items():
        yield f"{printable(name)}: {_value(value)}"


def _shown(row: Any, source: Path, split: Callable[[str], list[str]] | None) -> ShownRow:
    if isinstance(row, BadRow):
        record = row.record
        reason = f"field {record.field!r}: {record.reason}" if record.field else record.reason
        entry = quarantined(row)
        raw: dict[str, Any] = {name: _clipped(entry[name]) for name in ("raw", "raw_base64") if name in entry}
        return ShownRow(source, record.line, error=reason, other=raw)
    parts = list(_parts(row.record))
    if split is not None:
        for part in parts:
            part.tokens = split(part.text)
    other = {name: value for name, value in row.record.row.items() if name not in row.record.names}
    return ShownRow(source, row.line, row.record.shape, parts, other)


def _parts(record: Record) -> Iterator[Shown]:
    match record.shape:
        case "text":
            yield Shown("text", record.text)
        case "prompt":
            yield Shown(record.names[0], record.prompt)
            yield Shown(record.names[1], record.answer)
        case _:
            yield from (_turn(message) for message in record.messages)
            if record.shape == "teacher":
                yield Shown(record.names[1], record.answer)


def _turn(message: Message) -> Shown:
    return Shown(message.role, message.content, message.extra)


def _splitter(path: Path) -> Callable[[str], list[str]]:
    """The pieces of a text, one for each token; a character of several tokens is shown with its first."""
    from trainway.data.tokenizer import load_tokenizer, text_encoder

    encoder = text_encoder(load_tokenizer(path))

    def split(text: str) -> list[str]:
        pieces, done = [], 0
        for start, end in encoder.encode(text, add_special_tokens=False).offsets:
            pieces.append(text[max(start, done) : end])
            done = max(done, end)
        return pieces

    return split


def _token(piece: str) -> str:
    return printable(piece).replace("\n", "⏎\n")


def _value(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _clipped(text: str, limit: int = 2000) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
