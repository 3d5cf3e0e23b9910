"""Rows of a file of any format: which reader a suffix stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from trainway.data.csvfile import read_csv
from trainway.data.rows import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    MIB,
    PARQUET_SUFFIXES,
    BadRow,
    Row,
    file_kind,
    open_data,
    read_json_rows,
)
from trainway.errors import DataError


def read_rows(path: Path, max_mib: int, *, json_columns: Collection[str] = ()) -> Iterator[Row | BadRow]:
    """Stream the rows of one file of JSON lines, CSV or Parquet; a row of more than `max_mib` MiB is a bad one.

    json_columns: CSV columns whose cells hold JSON lists. Constant memory: one row, or one batch of Parquet rows.
    Raises DataError for a file that is empty, unreadable, corrupt or of another kind.
    """
    limit = max_mib * MIB
    match file_kind(path):
        case "json":
            with open_data(path) as file:
                yield from read_json_rows(file, path, limit)
        case "csv":
            with open_data(path) as file:
                yield from read_csv(file, path, limit, json_columns)
        case "parquet":
            from trainway.data.parquet import read_parquet  # pyarrow takes a while to import

            yield from read_parquet(path)
        case _:
            known = " ".join((*JSON_SUFFIXES, *CSV_SUFFIXES, *PARQUET_SUFFIXES))
            raise DataError(
                f"{path}: holds no rows",
                f"rows are read from {known} (all but Parquet also with .gz)",
                "convert or rename it",
            )
