"""Parquet files: rows streamed by row group, and written with column types found beforehand."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainway.data.columns import Column, Kind
from trainway.data.printable import printable
from trainway.data.rows import BadRecord, BadRow, MalformedError, Row, decode_json, empty_file, unreadable
from trainway.errors import DataError

BATCH_ROWS = 256
"""Rows decoded at once: of long conversations some MiB."""
GROUP_ROWS = 20_000
GROUP_BYTES = 32 << 20
JSON_MARK = {b"trainway": b"json"}
"""Metadata of a column whose values have no common type: each is kept as JSON text, and decoded when read."""

_Convert = Callable[[Any], Any]


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | BadRow]:
    """Stream the rows, numbered from 1; a null is absent from its row, at every depth.

    columns: read these only. Raises DataError for a file that is empty, corrupt, or without one of them.
    """
    with _opened(path) as file:
        if file.metadata.num_rows == 0:
            raise empty_file(path)
        schema = file.schema_arrow
        for name in columns or ():
            if name not in schema.names:
                raise DataError(
                    f"{path}: has no column {name!r}",
                    f"its columns are: {printable(', '.join(schema.names))}",
                    "name one of them",
                )
        converts = {name: _converter(schema.field(name)) for name in columns or schema.names}
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns) if columns else None):
            for row in _rows_of(batch, path, number):
                number += 1
                if isinstance(row, BadRow):
                    yield row
                    continue
                try:
                    yield Row(_converted(row, converts), number, None)
                except MalformedError as bad:
                    yield BadRow(BadRecord(path, number, bad.field, bad.reason), repr(row).encode(), 0)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, by its footer."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def column_names(path: Path) -> list[str]:
    """Columns of a Parquet file."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


class ParquetWriter:
    """Writes rows to an open file; `columns` say the type of each."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._columns = list(columns)
        self._schema = pa.schema([_field(column) for column in columns])
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[dict[str, Any]] = []
        self._bytes = 0

    def write(self, row: dict[str, Any], size: int) -> None:
        """size: about the row's bytes; it decides when a row group is full."""
        self._held.append(row)
        self._bytes += size
        if len(self._held) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._held:
            return
        arrays = []
        for column, field in zip(self._columns, self._schema, strict=True):
            values = (row.get(column.name) for row in self._held)
            arrays.append(pa.array([_encoded(value, column.kind) for value in values], type=field.type))
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._held, self._bytes = [], 0


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # not buffered beforehand: a row group of gigabytes is read by the page
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except pa.ArrowInvalid as error:
        if path.exists() and path.stat().st_size == 0:
            raise empty_file(path) from None
        raise DataError(
            f"{path}: truncated or corrupt Parquet file", str(error), "copy or download it again"
        ) from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet", str(error), "convert it anew") from error
    except OSError as error:
        # Arrow says of a damaged page that reading failed, without a number of the system's
        if error.errno is None:
            raise DataError(
                f"{path}: truncated or corrupt Parquet file", str(error), "copy or download it again"
            ) from error
        raise unreadable(path, error) from error


def _rows_of(batch: pa.RecordBatch, path: Path, before: int) -> Iterable[dict[str, Any] | BadRow]:
    try:
        rows: list[dict[str, Any] | BadRow] = batch.to_pylist()
    except UnicodeDecodeError:  # one row is at fault, not the batch
        rows = []
        for index in range(len(batch)):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                field = _undecodable(batch, index)
                bad = BadRecord(path, before + index + 1, field, f"not valid UTF-8 at byte {error.start}")
                rows.append(BadRow(bad, bytes(error.object), len(error.object)))
    return rows


def _undecodable(batch: pa.RecordBatch, index: int) -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            return name
    return ""


def _converted(row: dict[str, Any], converts: dict[str, _Convert | None]) -> dict[str, Any]:
    result = {}
    for name, value in row.items():
        if value is None:
            continue
        if (convert := converts[name]) is not None:
            try:
                value = convert(value)
            except MalformedError as bad:
                raise MalformedError(name, bad.reason) from None
            if value is None:  # not a number: what some writers put for a missing one
                continue
        result[name] = value
    return result


def _converter(field: pa.Field) -> _Convert | None:
    """What makes a value of this column JSON, without nulls in objects; None where it is already."""
    kind = field.type
    if (field.metadata or {}).get(b"trainway") == b"json":
        return decode_json
    if pa.types.is_struct(kind):
        fields = {child.name: _converter(child) for child in kind}
        return lambda value: _converted(value, fields)
    if pa.types.is_map(kind):
        item = _converter(kind.item_field) or (lambda value: value)
        return lambda value: {str(key): item(entry) for key, entry in value if entry is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _converter(kind.value_field)
        if inner is None:
            return None
        return lambda value: [None if entry is None else inner(entry) for entry in value]
    if pa.types.is_floating(kind):
        return _number
    if pa.types.is_dictionary(kind):
        return _converter(pa.field("", kind.value_type))
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return None
    return plain


def plain(value: Any) -> Any:
    """A value of a column as JSON has it: times in ISO 8601, bytes in base64, objects without nulls."""
    if isinstance(value, str | int | bool) or value is None:
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _number(value: float) -> float | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        raise MalformedError("", "is infinite, which JSON cannot say")
    return value


def _field(column: Column) -> pa.Field:
    return pa.field(
        column.name, _arrow_type(column.kind), metadata=JSON_MARK if column.kind == "json" else None
    )


def _arrow_type(kind: Kind) -> pa.DataType:
    match kind:
        case ("list", inner):
            return pa.list_(_field(Column("element", inner)))
        case ("object", *columns):
            return pa.struct([_field(column) for column in columns])
        case "bool":
            return pa.bool_()
        case "int":
            return pa.int64()
        case "float":
            return pa.float64()
        case _:
            return pa.string()


def _encoded(value: Any, kind: Kind) -> Any:
    """The value with JSON text in place of what has no common type."""
    if value is None:
        return None
    match kind:
        case "json":
            return json.dumps(value, ensure_ascii=False)
        case ("list", inner):
            return [_encoded(entry, inner) for entry in value]
        case ("object", *columns):
            return {column.name: _encoded(value.get(column.name), column.kind) for column in columns}
        case _:
            return value
