"""What all readers of rows share: a row or its named fault, texts checked; and the strict reader of JSON lines."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from trainway.errors import DataError

FileKind = Literal["text", "json", "csv", "parquet"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv",)
PARQUET_SUFFIXES = (".parquet",)
BOM = b"\xef\xbb\xbf"
MIB = 1 << 20
MAX_DEPTH = 128
"""JSON nested deeper is refused: a fixed bound, where the interpreter's own depends on who calls."""
KEPT_BYTES = 1 << 16
"""How much of a row that is too long to hold is kept for the quarantine."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used. `field` is empty where the record as a whole is malformed."""

    source: Path
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        field = f"field {self.field!r}: " if self.field else ""
        return f"{self.source}:{self.line}: {field}{self.reason}"


class Row(NamedTuple):
    """One row: its fields, the line at which it begins (Parquet: its number, both from 1), its bytes in the file.

    A tuple, not a dataclass: one is made for every row that is read. `raw` is None in a Parquet file.
    """

    value: dict[str, Any]
    line: int
    raw: bytes | None


class BadRow(NamedTuple):
    """A row that cannot be read, with its bytes, or the first `KEPT_BYTES` of the `size` bytes of a too long one."""

    record: BadRecord
    raw: bytes
    size: int


class TooLong(NamedTuple):
    """The beginning and the length of a line that is longer than the limit."""

    head: bytes
    size: int


class MalformedError(Exception):
    """Why a row is no record; `field` is a path such as `messages[2].content`, or empty for the whole row."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def file_kind(path: Path) -> FileKind | None:
    """What a file holds, by its suffix (.gz set aside); None when it is of no known kind."""
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    name = name.removesuffix(".gz")
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    if name.endswith(JSON_SUFFIXES):
        return "json"
    return "csv" if name.endswith(CSV_SUFFIXES) else None


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is perhaps compressed. Raises DataError when it is empty, unreadable or a corrupt gzip."""
    try:
        with _open(path) as file:
            if not file.peek(1):  # type: ignore[attr-defined]
                raise empty_file(path)
            if path.name.lower().endswith((".json", ".json.gz")):
                _refuse_array(file, path)
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or corrupt gzip file",
            str(error),
            "copy or download it again, then test it: gzip -t",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Number (from 1) and bytes of each line without its end; of one of more than `limit` bytes, its head."""
    number = 0
    readline, length = file.readline, limit + 3
    line = readline(length).removeprefix(BOM)
    while line:
        number += 1
        end = line[-2:]
        text = line[:-2] if end == b"\r\n" else line[:-1] if end[-1:] == b"\n" else line
        if len(text) <= limit:
            yield number, text
        else:
            head, size, ended = text[:KEPT_BYTES], len(text), end[-1:] == b"\n"
            del line, text  # the next read holds as much again
            while not ended and (rest := readline(MIB)):  # skip the rest without holding it
                ended = rest.endswith(b"\n")
                size += len(rest) - ended
            yield number, TooLong(head, size)
        line = readline(length)


def read_json_rows(file: BinaryIO, path: Path, limit: int) -> Iterator[Row | BadRow]:
    """The rows of an opened file of JSON lines; one of more than `limit` bytes is a bad one."""
    for number, line in read_lines(file, limit):
        if isinstance(line, TooLong):
            yield BadRow(BadRecord(path, number, "", too_long(limit)), line.head, line.size)
        elif line.strip():
            try:
                value = decode_object(line)
                if b"\\u" in line and _may_hold_lone_surrogate(line):
                    _check_all_strings(value)
                yield Row(value, number, line)
            except MalformedError as bad:
                yield BadRow(BadRecord(path, number, bad.field, bad.reason), line, len(line))


def decode_object(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON holds. Raises MalformedError for all that strict JSON, or a training
    record, cannot have: a key twice in one object, NaN, infinity, more than `MAX_DEPTH` levels."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(error, "of the line") from None
    record = decode_json(text)
    if type(record) is not dict:
        raise MalformedError(
            "", f"the line holds {type_name(record)}, not an object: one JSON object per line is needed"
        )
    return record


def decode_json(text: str) -> Any:
    """The value of a JSON text, strictly; see `decode_object`."""
    try:
        value = _JSON.decode(text)
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):
            raise MalformedError("", "begins with a byte order mark") from None
        raise MalformedError("", f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise MalformedError("", "JSON nested too deeply") from None
    except _RepeatedKeyError as twice:
        raise MalformedError(
            _path_of_repeated(text) or twice.key, "the key occurs twice in one object"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedError("", f"not valid JSON: {error}") from None
    if type(value) in _CONTAINERS and _is_deep(value):
        raise MalformedError("", f"JSON nested too deeply: more than {MAX_DEPTH} levels")
    return value


def check_text(text: object, field: str) -> str:
    """`text` itself. Raises MalformedError when it is no string, blank, or holds NUL or a lone surrogate."""
    if not isinstance(text, str):
        raise MalformedError(field, f"is {type_name(text)}, not a string")
    if not text or text.isspace():
        raise MalformedError(field, "empty")
    if (at := text.find("\0")) >= 0:
        raise MalformedError(field, f"holds a NUL character at character {at}")
    if not text.isascii():
        check_surrogates(text, field)
    return text


def check_surrogates(text: str, field: str) -> None:
    """Raises MalformedError for half of a surrogate pair: UTF-8 has no bytes for it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        reason = f"holds a lone surrogate U+{code:04X} at character {error.start}"
        raise MalformedError(field, reason) from None


def type_name(value: object) -> str:
    """What a value is, in the words of JSON and with its article."""
    names = {
        dict: "an object",
        list: "a list",
        tuple: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def join_path(path: str, key: str) -> str:
    """The path of a key in the object at `path`: `a.b`, or `a['odd key']`."""
    if not path:
        return key
    return f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"


def invalid_utf8(error: UnicodeDecodeError, within: str) -> MalformedError:
    return MalformedError("", f"not valid UTF-8 at byte {error.start} {within}")


def too_long(limit: int, cure: str = "") -> str:
    """The reason for a row or document of more than `limit` bytes."""
    return f"longer than max_document_mib ({limit // MIB} MiB){cure}"


def empty_file(path: Path) -> DataError:
    return DataError(f"{path}: the file is empty", fix="restore it, or remove it from the sources")


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read", str(error.strerror or error), "check the file and its permissions"
    )


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb", buffering=MIB)


def _refuse_array(file: BinaryIO, path: Path) -> None:
    start = file.peek(64).removeprefix(BOM).lstrip()  # type: ignore[attr-defined]
    first = start.split(b"\n", 1)[0].rstrip()
    if start.startswith(b"[") or first == b"{":
        what = "one JSON array" if start.startswith(b"[") else "JSON spread over several lines"
        select = "'.[]'" if start.startswith(b"[") else "."
        raise DataError(
            f"{path}: holds {what}, not JSON lines",
            "one JSON object per line is needed, so that a file of any size is read in little memory",
            f"jq -c {select} {path.name} > {path.name.removesuffix('.gz').removesuffix('.json')}.jsonl",
        )


def _may_hold_lone_surrogate(line: bytes) -> bool:
    # behind an escaped backslash nothing is an escape: then what looks like a pair may be none
    return bool(_LONE_SURROGATE.search(line) or (b"\\\\u" in line and _SURROGATE.search(line)))


def _check_all_strings(value: dict[str, Any]) -> None:
    """Raises MalformedError for a lone surrogate anywhere in a record: it could not be written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        for path, leaf in _walk(value):
            if isinstance(leaf, str):
                check_surrogates(leaf, path)
            elif isinstance(leaf, dict):
                for key in leaf:
                    check_surrogates(key, path)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of every object, list and leaf below a value, and of itself, in order."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if isinstance(node, dict):
            stack += [(join_path(path, key), child) for key, child in reversed(node.items())]
        elif isinstance(node, list):
            stack += [(f"{path}[{i}]", node[i]) for i in range(len(node) - 1, -1, -1)]


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        below = []
        for node in level:
            children = node.values() if type(node) is dict else node
            if not _CONTAINERS.isdisjoint(map(type, children)):
                below += [child for child in children if type(child) in _CONTAINERS]
        if not below:
            return False
        level = below
    return True


class _RepeatedKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Marked(dict[str, Any]):
    """An object in which `twice` is a key that occurs more than once."""

    twice = ""


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def _path_of_repeated(text: str) -> str:
    def mark(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        marked = _Marked(pairs)
        if len(marked) != len(pairs):
            marked.twice = _repeated(pairs)
        return marked

    try:
        whole = json.JSONDecoder(object_pairs_hook=mark).decode(text)
    except (ValueError, RecursionError):  # what follows the key is malformed too
        return ""
    for path, node in _walk(whole):
        if isinstance(node, _Marked) and node.twice:
            return join_path(path, node.twice)
    return ""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _RepeatedKeyError(_repeated(pairs))
    return record


def _no_constant(name: str) -> Any:
    raise MalformedError("", f"not valid JSON: {name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in _INFINITIES:  # they would be written as Infinity, which is not JSON
        raise MalformedError("", f"the number {digits[:20]} is out of range")
    return number


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
_INFINITIES = (float("inf"), float("-inf"))
_CONTAINERS = frozenset((dict, list))
# Both begin with plain bytes, which makes the search for them fast.
_SURROGATE = re.compile(rb"\\u[dD][89abAB-Fc-f]")
_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F])"
)
