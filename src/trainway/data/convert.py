"""Conversion between JSON lines, CSV and Parquet, and between the shapes of a row; streamed, written atomically."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainway.config.schema import DataConfig
from trainway.data.columns import Column, Columns
from trainway.data.dedup import Deduplicator
from trainway.data.quarantine import bad_rows_error, check_output, open_quarantine
from trainway.data.records import FieldNames, Kind, Record, Shape
from trainway.data.rows import BadRecord, BadRow, MalformedError, file_kind
from trainway.data.validate import Progress, find_rows, read_all
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_open

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass
class Conversion:
    """What was written, and what was left out of it."""

    out: Path
    rows: int = 0
    bad: int = 0  # set aside in the quarantine
    duplicates: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(
        default_factory=Counter
    )  # parts of rows that the new shape has no place for

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shapes": dict(self.shapes), "left_out": dict(self.left_out)}


def convert(
    source: str,
    out: Path,
    *,
    config: DataConfig | None = None,
    names: FieldNames | None = None,
    from_shape: Kind = "auto",
    to_shape: Shape | None = None,
    quarantine: Path | None = None,
    dedup: bool = False,
    force: bool = False,
    progress: Progress = lambda label, done, total: None,
) -> Conversion:
    """Write the rows of `source` (a file, directory or pattern) to `out`, in the format of its suffix.

    to_shape: None keeps each row's shape, with the usual field names. dedup: of rows with the same content the
    first is kept. Raises DataError for a bad row, unless there is a `quarantine` for it, and when no row is left.
    """
    config = config or DataConfig()
    check_suffix(out)
    paths = find_rows([source], config)
    check_output(out, paths, force=force)
    job = _Job(paths, config, names, from_shape, to_shape, dedup, progress)

    def refuse(bad: BadRow) -> None:
        if quarantine is None:
            raise DataError(
                str(bad.record),
                "the row is malformed; nothing was written",
                "correct it, or set such rows aside: --quarantine FILE",
            )

    columns: list[Column] = []
    if file_kind(out) != "json":
        # A table needs its columns beforehand: a first pass finds them, and holds none of the rows.
        found = Columns()
        for row in job.rows(Conversion(out), refuse, "finding the columns"):
            found.add(row)
        columns = found.result()
    result = Conversion(out)
    with open_quarantine(quarantine, [*paths, out], force=force) as aside:

        def set_aside(bad: BadRow) -> None:
            refuse(bad)
            aside.add(bad)

        # without a row there is no output, and the quarantine is kept all the same
        with suppress(NothingWrittenError), open_writer(out, columns) as write:
            for row in job.rows(result, set_aside, "converting"):
                write(row)
            if not result.rows:
                raise NothingWrittenError
        result.bad = aside.count
    if not result.rows:
        raise bad_rows_error(result.bad, result.bad, quarantine)
    return result


@dataclass(frozen=True)
class _Job:
    """What `convert` was asked for."""

    paths: list[Path]
    config: DataConfig
    names: FieldNames | None
    from_shape: Kind
    to_shape: Shape | None
    dedup: bool
    progress: Progress

    def rows(
        self, result: Conversion, on_bad: Callable[[BadRow], None], label: str
    ) -> Iterator[dict[str, Any]]:
        """The rows to write, counted in `result`."""
        seen = Deduplicator() if self.dedup else None
        records = read_all(
            self.paths, self.config, self.names, self.from_shape, progress=self.progress, label=label
        )
        for located in records:
            if isinstance(located, BadRow):
                on_bad(located)
                continue
            record = located.record
            if seen is not None and not seen.is_new(record.content_key()):
                result.duplicates += 1
                continue
            try:
                row = reshape(record, self.to_shape, result.left_out)
            except MalformedError as bad:
                reason = BadRecord(located.source, located.line, bad.field, bad.reason)
                data = located.raw or json_line(record.row).rstrip()
                on_bad(BadRow(reason, data, len(data)))
                continue
            result.rows += 1
            result.shapes[self.to_shape or record.shape] += 1
            yield row


def check_suffix(out: Path) -> None:
    """Raises ConfigError when no format is written under this name."""
    if not out.name.lower().endswith(OUTPUT_SUFFIXES):
        raise ConfigError(
            f"{out}: of an unknown format", f"the suffix says it: {' '.join(OUTPUT_SUFFIXES)}", "rename it"
        )


@contextmanager
def open_writer(out: Path, columns: list[Column]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes one row; the file appears at the end, complete."""
    with atomic_open(out) as raw, _compressed(out, raw) as file:
        match file_kind(out):
            case "parquet":
                from trainway.data.parquet import ParquetWriter

                writer = ParquetWriter(file, columns)
                try:
                    yield lambda row: writer.write(row, row_size(row))
                finally:
                    writer.close()  # before its file is
            case "csv":
                from trainway.data.csvfile import csv_line

                names = [column.name for column in columns]
                file.write(csv_line(names))
                yield lambda row: _written(file, csv_line([row.get(name) for name in names]))
            case _:
                yield lambda row: _written(file, json_line(row))


def json_line(row: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8, nothing escaped that need not be."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def row_size(value: Any) -> int:
    """About how many bytes a row, or a value in it, takes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum([row_size(item) for item in value.values()])
    return sum([row_size(item) for item in value]) if isinstance(value, list) else 8


def reshape(record: Record, to_shape: Shape | None, left_out: Counter[str] | None = None) -> dict[str, Any]:
    """The row of a record in another shape (None: its own) under the usual names; its other fields follow along.

    Raises MalformedError where the shape has no place for the row, such as a text as messages.
    """
    left_out = Counter() if left_out is None else left_out
    shape = to_shape or record.shape
    if shape == record.shape:
        return _renamed(record, left_out)
    if "text" in (shape, record.shape):
        reason = f"a row of {record.shape} has no form as {shape}: only a chat template joins turns to a text"
        raise MalformedError(record.names[0], reason)
    fields = _fields(record, shape, left_out)
    row: dict[str, Any] = {}
    for name, value in record.row.items():
        if name in record.names:
            row.update(fields)
        elif name in fields:
            _count_replaced(name, value, left_out)
        else:
            row[name] = value
    return row


def _renamed(record: Record, left_out: Counter[str]) -> dict[str, Any]:
    usual = _USUAL_NAMES[record.shape]
    has_turns = record.shape in ("messages", "teacher")
    if record.names == usual and not has_turns:
        return record.row
    new = dict(zip(record.names, usual, strict=True))
    row: dict[str, Any] = {}
    for name, value in record.row.items():
        if name in new:
            row[new[name]] = value
        elif name in usual:
            _count_replaced(name, value, left_out)
        else:
            row[name] = value
    if has_turns:
        row[usual[0]] = [message.as_dict() for message in record.messages]
    return row


def _count_replaced(name: str, value: Any, left_out: Counter[str]) -> None:
    if value is not None:
        left_out[f"another field named {name}"] += 1


def _fields(record: Record, shape: Shape, left_out: Counter[str]) -> dict[str, Any]:
    turns = record.turns()
    field = record.names[0]
    if shape == "messages":
        return {"messages": [turn.as_dict() for turn in turns]}
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    before, answer = turns[:last], turns[last]
    if last + 1 < len(turns):
        left_out["turns after the last answer"] += len(turns) - last - 1
    if not before:
        raise MalformedError(field, "begins with its last answer: there is no prompt")
    if not answer.content:
        raise MalformedError(f"{field}[{last}].content", "empty")
    for name in answer.extra:
        left_out[f"{name} of the answer"] += 1
    if shape == "teacher":
        return {"content": [turn.as_dict() for turn in before], "teacher_response": answer.content}
    if len(before) != 1 or before[0].role != "user":
        roles = ", ".join(turn.role for turn in turns[:6]) + (", …" if len(turns) > 6 else "")
        raise MalformedError(field, f"prompt and completion are one turn each; it has {roles}")
    for name in before[0].extra:
        left_out[f"{name} of the prompt"] += 1
    return {"prompt": before[0].content, "completion": answer.content}


class NothingWrittenError(Exception):
    """Ends the block of `open_writer` without a file."""


@contextmanager
def _compressed(out: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if not out.name.lower().endswith(".gz"):
        yield file
        return
    with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:  # same rows, same bytes
        yield cast(BinaryIO, packed)


def _written(file: BinaryIO, line: bytes) -> None:
    file.write(line)


_USUAL_NAMES: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "teacher": ("content", "teacher_response"),
    "text": ("text",),
}
