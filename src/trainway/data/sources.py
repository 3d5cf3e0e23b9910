"""Where documents come from: expands the configured patterns to files and streams their records."""

from __future__ import annotations

import difflib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from trainway.config.schema import DataConfig
from trainway.data.shards import SHARD_MANIFEST, read_shards
from trainway.errors import DataError

TextUnit = Literal["file", "paragraph", "line"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BOM = b"\xef\xbb\xbf"
MIB = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of documents. `hash` (xxh3_128) is known already when a shard manifest was checked."""

    path: Path
    kind: Literal["text", "json"]
    text_unit: TextUnit
    size: int
    hash: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, its file and the line (from 1) at which it begins."""

    text: str
    source: Path
    line: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be a document. `field` is empty where the record as a whole is malformed."""

    source: Path
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        field = f"field {self.field!r}: " if self.field else ""
        return f"{self.source}:{self.line}: {field}{self.reason}"


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

    Holds at most one document, of up to `max_document_mib`, in memory. `text_unit` overrides the setting.
    Raises DataError for a file that is missing, empty, of an unknown kind, or a corrupt gzip file.
    """
    kind = _kind(path)
    if kind is None:
        raise _unknown_kind(path, "data")
    limit = config.max_document_mib * MIB
    try:
        with _open(path) as file:
            if not file.peek(1):  # type: ignore[attr-defined]
                raise _empty_file(path)
            if kind == "json":
                yield from _read_json_lines(file, path, config.text_field, limit)
            else:
                yield from _TEXT_READERS[text_unit or config.text_unit](file, path, limit)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or corrupt gzip file",
            str(error),
            "copy or download it again, then test it: gzip -t",
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read", str(error.strerror), "check the file and its permissions"
        ) from error


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
        _file_source(m, config.text_unit, setting) for m in matches if m.is_file() and _kind(m) is not None
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
        known = [path for path in paths if _kind(path) is not None]
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
        Source(shard.path, _kind(shard.path) or "text", "line", shard.size, shard.hash) for shard in shards
    ]


def _file_source(path: Path, text_unit: TextUnit, setting: str) -> Source:
    kind = _kind(path)
    if kind is None:
        raise _unknown_kind(path, setting)
    if not path.is_file():
        raise DataError(
            f"{setting}: {path} is not a regular file", fix="name a file, a directory or a pattern"
        )
    size = path.stat().st_size
    if size == 0:
        raise _empty_file(path)
    return Source(path, kind, text_unit, size)


def _kind(path: Path) -> Literal["text", "json"] | None:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    return "json" if name.endswith(JSON_SUFFIXES) else None


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb", buffering=MIB)


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and bytes of each line without its end; None is a line of more than `limit` bytes."""
    number = 0
    while line := file.readline(limit + 3):
        number += 1
        if number == 1 and line.startswith(BOM):
            line = line[len(BOM) :]
        ended = line.endswith(b"\n")
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1] if ended else line
        if len(line) <= limit:
            yield number, line
            continue
        while not ended and (rest := file.readline(MIB)):  # skip the rest without holding it
            ended = rest.endswith(b"\n")
        yield number, None


def _read_json_lines(file: BinaryIO, path: Path, field: str, limit: int) -> Iterator[Document | BadRecord]:
    for number, line in _lines(file, limit):
        if line is None:
            yield BadRecord(path, number, "", f"longer than max_document_mib ({limit // MIB} MiB)")
        elif line.strip():
            try:
                yield Document(_record_text(line, field), path, number)
            except _MalformedError as bad:
                yield BadRecord(path, number, bad.field, bad.reason)


def _record_text(line: bytes, field: str) -> str:
    try:
        record = _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _invalid_utf8(error, "of the line") from None
    except json.JSONDecodeError as error:
        raise _MalformedError("", f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _MalformedError("", "JSON nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _MalformedError("", f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise _MalformedError(
            "", f"the line holds {_type_name(record)}, not an object: one JSON object per line is needed"
        )
    if field not in record:
        names = ", ".join(repr(name) for name in list(record)[:10]) or "none"
        near = difflib.get_close_matches(field, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _MalformedError(field, f"missing; the record has {names}{hint}")
    text = record[field]
    if not isinstance(text, str):
        raise _MalformedError(field, f"is {_type_name(text)}, not a string")
    return _checked(text, field)


def _read_whole(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    data = file.read(limit + len(BOM) + 1).removeprefix(BOM)
    if len(data) > limit:
        reason = f"longer than max_document_mib ({limit // MIB} MiB): set text_unit to paragraph or line"
        yield BadRecord(path, 1, "", reason)
    else:
        yield _text_document(data, path, 1, "of the file")


def _read_lines(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    for number, line in _lines(file, limit):
        if line is None:
            yield BadRecord(path, number, "", f"longer than max_document_mib ({limit // MIB} MiB)")
        elif line.strip():
            yield _text_document(line, path, number, "of the line")


def _read_paragraphs(file: BinaryIO, path: Path, limit: int) -> Iterator[Document | BadRecord]:
    """Paragraphs are runs of lines between blank ones; no more than `limit` bytes of one are held."""
    held: list[bytes] = []
    size = first = 0
    for number, line in _lines(file, limit):
        if line is not None and not line.strip():
            if size:
                yield _paragraph(held, size, path, first, limit)
            held, size = [], 0
            continue
        first = number if not size else first
        size += limit + 1 if line is None else len(line) + 1
        if line is not None and size - 1 <= limit:
            held.append(line)
    if size:
        yield _paragraph(held, size, path, first, limit)


def _paragraph(held: list[bytes], size: int, path: Path, first: int, limit: int) -> Document | BadRecord:
    if size - 1 > limit:
        return BadRecord(
            path, first, "", f"longer than max_document_mib ({limit // MIB} MiB): set text_unit to line"
        )
    return _text_document(b"\n".join(held), path, first, "of the paragraph")


def _text_document(data: bytes, path: Path, line: int, within: str) -> Document | BadRecord:
    try:
        return Document(_checked(data.decode("utf-8"), ""), path, line)
    except UnicodeDecodeError as error:
        return BadRecord(path, line, "", _invalid_utf8(error, within).reason)
    except _MalformedError as bad:
        return BadRecord(path, line, bad.field, bad.reason)


def _checked(text: str, field: str) -> str:
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    if not text or text.isspace():
        raise _MalformedError(field, "empty")
    if (at := text.find("\0")) >= 0:
        raise _MalformedError(field, f"holds a NUL character at character {at}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise _MalformedError(
                field, f"holds a lone surrogate U+{code:04X} at character {error.start}"
            ) from None
    return text


class _MalformedError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def _invalid_utf8(error: UnicodeDecodeError, within: str) -> _MalformedError:
    return _MalformedError("", f"not valid UTF-8 at byte {error.start} {within}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _MalformedError(twice, "the key occurs twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise _MalformedError("", f"not valid JSON: {name} is not a JSON number")


def _type_name(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _missing(path: Path, setting: str) -> DataError:
    if not path.parent.is_dir():
        return DataError(
            f"{setting}: {path} is missing", f"the directory {path.parent} is missing too", "correct the path"
        )
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    why = f"{path.parent} holds no such file" + (f"; nearest names: {', '.join(near)}" if near else "")
    return DataError(f"{setting}: {path} is missing", why, "correct the path")


def _unknown_kind(path: Path, setting: str) -> DataError:
    return DataError(f"{setting}: {path} is of an unknown kind", _known_kinds(), "convert or rename it")


def _known_kinds() -> str:
    return f"known kinds: {' '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}, each also with .gz"


def _empty_file(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty", fix="restore it, or remove it from the sources")


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_TEXT_READERS: dict[str, Callable[[BinaryIO, Path, int], Iterator[Document | BadRecord]]] = {
    "file": _read_whole,
    "paragraph": _read_paragraphs,
    "line": _read_lines,
}
