"""Where documents come from: expands the configured patterns to files and streams their records."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from trainway.config.schema import DataConfig
from trainway.data.formats import read_rows
from trainway.data.printable import printable
from trainway.data.rows import (
    BOM,
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    MIB,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    BadRecord,
    BadRow,
    FileKind,
    MalformedError,
    Row,
    check_text,
    decode_object,
    empty_file,
    file_kind,
    invalid_utf8,
    open_data,
    read_lines,
    too_long,
)
from trainway.data.shards import SHARD_MANIFEST, read_shards
from trainway.errors import DataError

TextUnit = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class Source:
    """One file of documents. `hash` (xxh3_128) is known already when a shard manifest was checked."""

    path: Path
    kind: FileKind
    text_unit: TextUnit
    size: int
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, its file and the line (from 1) at which it begins."""

    text: str
    source: Path
    line: int


def find_sources(
    patterns: Sequence[str], config: DataConfig, *, setting: str, root: Path | None = None
) -> list[Source]:
    """The files that `patterns` (files, directories, globs; relative to `root`) stand for, in fixed order.

    Directories are read recursively, sorted; hidden files and unknown suffixes in them are left out. A
    directory with a `manifest.json` of shards is checked against it. `setting` names the patterns in errors.
    Raises DataError for whatever is missing, empty, altered, named twice or of an unknown kind.
    """
    sources: list[Source] = []
    seen: dict[Path, str] = {}
    for pattern in patterns:
        for source in _expand(pattern, config, setting, root or Path.cwd()):
            key = source.path.resolve()
            if key in seen:
                raise DataError(
                    f"{setting}: {source.path} is named twice",
                    f"by {seen[key]!r} and by {pattern!r}",
                    "name each file once, so that its documents are not trained on twice",
                )
            seen[key] = pattern
            sources.append(source)
    return sources


def read_documents(
    path: Path, config: DataConfig, *, text_unit: TextUnit | None = None
) -> Iterator[Document | BadRecord]:
    """Stream the documents of one file, and a BadRecord for each record that cannot be one.

    Holds at most one document, of up to `max_document_mib`, in memory (of Parquet, one batch of rows). The line
    of a Parquet row is its number. `text_unit` overrides the setting. Raises DataError for a file that is missing,
    empty, of an unknown kind, corrupt, or a table without the text's column.
    """
    limit = config.max_document_mib * MIB
    match file_kind(path):
        case "json":
            with open_data(path) as file:
                yield from _read_json_lines(file, path, config.text_field, limit)
        case "text":
            with open_data(path) as file:
                yield from _TEXT_READERS[text_unit or config.text_unit](file, path, limit)
        case "csv" | "parquet":
            yield from _read_table(path, config.text_field, config.max_document_mib)
        case _:
            raise _unknownfile_kind(path, "data")


def _expand(pattern: str, config: DataConfig, setting: str, root: Path) -> list[Source]:
    path = root / Path(pattern).expanduser()
    if path.is_dir():
        return _directory_sources(path, config, setting)
    if path.exists():
        return [_file_source(path, config.text_unit, setting)]
    if not glob.has_magic(pattern):
        raise _missing(path, setting)
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise DataError(
            f"{setting}: the pattern {pattern!r} matches nothing", f"looked in {root}", "correct the pattern"
        )
    sources = [
        _file_source(m, config.text_unit, setting)
        for m in matches
        if m.is_file() and file_kind(m) is not None
    ]
    if "**" not in pattern:  # a recursive pattern lists the files of its directories already
        for match in (m for m in matches if m.is_dir()):
            sources += _directory_sources(match, config, setting)
    if not sources:
        raise DataError(f"{setting}: the pattern {pattern!r} matches no file of a known kind", _known_kinds())
    return sources


def _directory_sources(folder: Path, config: DataConfig, setting: str) -> list[Source]:
    sources: list[Source] = []
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(current, name) for name in sorted(names) if not name.startswith(".")]
        known = [path for path in paths if file_kind(path) is not None]
        shards = _shard_sources(Path(current), known) if SHARD_MANIFEST in names else None
        sources += [_file_source(p, config.text_unit, setting) for p in known] if shards is None else shards
    if not sources:
        raise DataError(f"{setting}: {folder} holds no file of a known kind", _known_kinds())
    return sources


def _shard_sources(folder: Path, known: list[Path]) -> list[Source] | None:
    shards = read_shards(folder, known)
    if shards is None:
        return None
    return [
        Source(shard.path, file_kind(shard.path) or "text", "line", shard.size, shard.hash)
        for shard in shards
    ]


def _file_source(path: Path, text_unit: TextUnit, setting: str) -> Source:
    kind = file_kind(path)
    if kind is None:
        raise _unknownfile_kind(path, setting)
    if not path.is_file():
        raise DataError(
            f"{setting}: {path} is not a regular file", fix="name a file, a directory or a pattern"
        )
    size = path.stat().st_size
    if size == 0:
        raise empty_file(path)
    return Source(path, kind, text_unit, size)


def _read_json_lines(file: BinaryIO, path: Path, field: str, limit: int) -> Iterator[Document | BadRecord]:
    for number, line in read_lines(file, limit):
        if not isinstance(line, bytes):
            yield BadRecord(path, number, "", too_long(limit))
        elif line.strip():
            try:
                yield Document(_record_text(line, field), path, number)
            except MalformedError as bad:
                yield BadRecord(path, number, bad.field, bad.reason)


def _record_text(line: bytes, field: str) -> str:
    record = decode_object(line)
    if field not in record:
        names = ", ".join(repr(name) for name in list(record)[:10]) or "none"
        near = difflib.get_close_matches(field, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MalformedError(field, f"missing; the record has {names}{hint}")
    return _unix_text(record[field], field)


def _read_table(path: Path, field: str, max_mib: int) -> Iterator[Document | BadRecord]:
    for row in _text_rows(path, field, max_mib):
        if isinstance(row, BadRow):
            yield row.record
            continue
        try:
            text = _unix_text(row.value.get(field, ""), field)
            if len(text) > max_mib * MIB:
                raise MalformedError("", too_long(max_mib * MIB))
            yield Document(text, path, row.line)
        except MalformedError as bad:
            yield BadRecord(path, row.line, bad.field, bad.reason)


def _text_rows(path: Path, field: str, max_mib: int) -> Iterator[Row | BadRow]:
    if file_kind(path) == "parquet":
        from trainway.data.parquet import read_parquet

        return read_parquet(path, columns=[field])
    from trainway.data.csvfile import header_of

    header = header_of(path)
    if field not in header:
        raise DataError(
            f"{path}: has no column {field!r}",
            f"its columns are: {printable(', '.join(header))}",
            "set data.text_field",
        )
    return read_rows(path, max_mib)


def _read_whole(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    data = file.read(limit + len(BOM) + 1).removeprefix(BOM)
    if len(data) > limit:
        reason = too_long(limit, ": set text_unit to paragraph or line")
        yield BadRecord(path, 1, "", reason)
    else:
        yield _text_document(data, path, 1, "of the file")


def _read_lines(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    for number, line in read_lines(file, limit):
        if not isinstance(line, bytes):
            yield BadRecord(path, number, "", too_long(limit))
        elif line.strip():
            yield _text_document(line, path, number, "of the line")


def _read_paragraphs(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    """Paragraphs are runs of lines between blank ones; no more than `limit` bytes of one are held."""
    held: list[bytes] = []
    size = first = 0
    for number, line in read_lines(file, limit):
        if isinstance(line, bytes) and not line.strip():
            if size:
                yield _paragraph(held, size, path, first, limit)
            held, size = [], 0
            continue
        first = number if not size else first
        size += len(line) + 1 if isinstance(line, bytes) else limit + 1
        if isinstance(line, bytes) and size - 1 <= limit:
            held.append(line)
    if size:
        yield _paragraph(held, size, path, first, limit)


def _paragraph(held: list[bytes], size: int, path: Path, first: int, limit: int) -> Document | BadRecord:
    if size - 1 > limit:
        return BadRecord(path, first, "", too_long(limit, ": set text_unit to line"))
    return _text_document(b"\n".join(held), path, first, "of the paragraph")


def _text_document(data: bytes, path: Path, line: int, within: str) -> Document | BadRecord:
    try:
        return Document(_unix_text(data.decode("utf-8"), ""), path, line)
    except UnicodeDecodeError as error:
        return BadRecord(path, line, "", invalid_utf8(error, within).reason)
    except MalformedError as bad:
        return BadRecord(path, line, bad.field, bad.reason)


def _unix_text(text: object, field: str) -> str:
    """The text of a document: checked, with `\\n` for every end of line."""
    checked = check_text(text, field)
    return checked.replace("\r\n", "\n") if "\r\n" in checked else checked


def _missing(path: Path, setting: str) -> DataError:
    if not path.parent.is_dir():
        return DataError(
            f"{setting}: {path} is missing", f"the directory {path.parent} is missing too", "correct the path"
        )
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    why = f"{path.parent} holds no such file" + (f"; nearest names: {', '.join(near)}" if near else "")
    return DataError(f"{setting}: {path} is missing", why, "correct the path")


def _unknownfile_kind(path: Path, setting: str) -> DataError:
    return DataError(f"{setting}: {path} is of an unknown kind", _known_kinds(), "convert or rename it")


def _known_kinds() -> str:
    lines = " ".join(TEXT_SUFFIXES + JSON_SUFFIXES + CSV_SUFFIXES)
    return f"known kinds: {lines}, each also with .gz, and {' '.join(PARQUET_SUFFIXES)}"


_TEXT_READERS: dict[str, Callable[[BinaryIO, Path, int], Iterator[Document | BadRecord]]] = {
    "file": _read_whole,
    "paragraph": _read_paragraphs,
    "line": _read_lines,
}
