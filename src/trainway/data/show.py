"""Shows rows to a person: field by field, control characters made visible, or as the tokens that training sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainway.config.schema import DataConfig
from trainway.data.printable import printable
from trainway.data.quarantine import quarantined
from trainway.data.records import FieldNames, Kind, Message, Record, read_records
from trainway.data.rows import BadRow, file_kind
from trainway.data.validate import find_rows
from trainway.errors import DataError

if TYPE_CHECKING:
    from trainway.data.chat import ChatEncoder

TRAINED, CONTEXT, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
"""Colours of a terminal: bold green, dim, none."""


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
    rendered: list[tuple[str, bool]] | None = None
    """As fine-tuning sees the row: the text of each token, and whether it is trained."""
    left_out: int = 0
    """Turns that were left out of `rendered`, since the row was too long."""

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
    max_tokens: int | None = None,
    warn: Callable[[str], None] = lambda warning: None,
) -> list[ShownRow]:
    """The row at `line` (its number as validation gives it; of Parquet, the row's number), or the first few.

    tokenizer: show tokens; with a chat template (config.chat_template or the tokenizer's own) those of the rendered
    row, and which of them are trained. max_tokens: the length that config.over_length is about. `warn` is given the
    encoder's warnings. Raises DataError for a file that cannot be read or has no such row, ConfigError for a template
    that cannot be had.
    """
    config = config or DataConfig()
    (source, *_) = find_rows([path], config)
    split = _row_encoder(tokenizer, config, max_tokens, warn) if tokenizer else None
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


def render(row: ShownRow, *, colour: bool = False) -> Iterator[str]:
    """The lines that show a row. Trained tokens stand in ⟦brackets⟧, or are green where `colour` is asked for."""
    where = f"{printable(str(row.source))}:{row.line}"
    turns = f", {len(row.parts)} turns" if row.shape in ("messages", "teacher") else ""
    if row.error:
        yield f"{where}  bad: {printable(row.error)}"
    else:
        yield f"{where}  {row.shape}{turns}, {row.num_characters:,} characters{_counts(row)}"
    if row.rendered is not None:
        yield _colours(row.rendered) if colour else _brackets(row.rendered)
    for part in row.parts if row.rendered is None else ():
        count = f", {len(part.tokens):,} tokens" if part.tokens is not None else ""
        yield f"── {printable(part.label)} ({len(part.text):,} characters{count})"
        yield printable(part.text) if part.tokens is None else "│".join(map(_token, part.tokens))
        for name, value in part.extra.items():
            yield f"   {printable(name)}: {_value(value)}"
    for name, value in row.other.items():
        yield f"{printable(name)}: {_value(value)}"


def _counts(row: ShownRow) -> str:
    if row.rendered is None:
        return ""
    trained = sum(flag for _, flag in row.rendered)
    left_out = f", {row.left_out:,} turns left out" if row.left_out else ""
    return f", {len(row.rendered):,} tokens, {trained:,} trained{left_out}"


def _brackets(tokens: list[tuple[str, bool]]) -> str:
    runs = [
        (trained, "│".join([_token(piece) for piece, _ in run]))
        for trained, run in groupby(tokens, key=lambda token: token[1])
    ]
    return "".join([f"⟦{text}⟧" if trained else text for trained, text in runs])


def _colours(tokens: list[tuple[str, bool]]) -> str:
    pieces = [f"{TRAINED if trained else CONTEXT}{_token(piece)}{PLAIN}" for piece, trained in tokens]
    return f"{CONTEXT}│{PLAIN}".join(pieces)


def _shown(row: Any, source: Path, encode: Callable[[Record, ShownRow], None] | None) -> ShownRow:
    if isinstance(row, BadRow):
        record = row.record
        reason = f"field {record.field!r}: {record.reason}" if record.field else record.reason
        entry = quarantined(row)
        raw: dict[str, Any] = {name: _clipped(entry[name]) for name in ("raw", "raw_base64") if name in entry}
        return ShownRow(source, record.line, error=reason, other=raw)
    other = {name: value for name, value in row.record.row.items() if name not in row.record.names}
    shown = ShownRow(source, row.line, row.record.shape, list(_parts(row.record)), other)
    if encode is not None:
        encode(row.record, shown)
    return shown


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


def _row_encoder(
    path: Path, config: DataConfig, max_tokens: int | None, warn: Callable[[str], None]
) -> Callable[[Record, ShownRow], None]:
    """Adds tokens to a shown row: of its parts where there is no chat template, else of the rendered row."""
    from trainway.data.chat import UNLIMITED, ChatEncoder
    from trainway.data.tokenizer import load_tokenizer, text_encoder

    tokenizer = load_tokenizer(path)
    encoder = ChatEncoder(tokenizer, config, max_tokens or UNLIMITED)
    if encoder.template is not None:
        told: list[str] = []

        def encode(record: Record, row: ShownRow) -> None:
            _add_rendered(encoder, record, row, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
            for warning in encoder.warnings[len(told) :]:
                told.append(warning)
                warn(warning)

        return encode
    backend = text_encoder(tokenizer)

    def split(record: Record, row: ShownRow) -> None:
        for part in row.parts:
            part.tokens, done = [], 0
            for start, end in backend.encode(part.text, add_special_tokens=False).offsets:
                part.tokens.append(part.text[max(start, done) : end])
                done = max(done, end)

    return split


def _add_rendered(
    encoder: ChatEncoder, record: Record, row: ShownRow, decode: Callable[[list[int]], str]
) -> None:
    from trainway.data.chat import Refused

    (result,) = encoder([record])
    if isinstance(result, Refused):
        field = f"field {result.field!r}: " if result.field else ""
        row.error = field + (result.why if result.reason == "malformed" else f"{result.reason}: {result.why}")
        return
    pieces = _pieces(result.tokens.tolist(), decode)
    row.rendered = list(zip(pieces, result.trained.tolist(), strict=True))
    row.left_out = result.left_out


def _pieces(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token as it stands among the others; a character of several tokens is shown with its first."""
    pieces = [""] * len(ids)
    before = begin = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids) and end - begin < 8:
            continue  # the rest of a character is still to come
        pieces[begin] = text[len(decode(ids[before:begin])) :]
        before, begin = begin, end
    return pieces


def _token(piece: str) -> str:
    return printable(piece).replace("\n", "⏎\n")


def _value(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _clipped(text: str, limit: int = 2000) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
