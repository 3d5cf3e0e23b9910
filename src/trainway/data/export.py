"""Export: a split of a Hub dataset, a directory or a file, as JSON lines of conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainway.config.schema import DataConfig
from trainway.data.convert import NothingWrittenError, json_line, open_writer, reshape
from trainway.data.formats import read_rows
from trainway.data.printable import printable
from trainway.data.quarantine import Quarantine, check_output, open_quarantine
from trainway.data.records import FieldNames, Kind, parse_record
from trainway.data.rows import BadRecord, BadRow, MalformedError, Row, file_kind
from trainway.data.splits import parse_split
from trainway.data.trees import Paths, conversations, is_tree
from trainway.errors import ConfigError, DataError

MessagesKey = Literal["messages", "conversations"]
LANGUAGE_COLUMNS = ("lang", "language", "reasoning_language")

Progress = Callable[[str, int, int], None]
"""Called with (label, rows done, 0): how many there are is not known before the end."""


@dataclass
class Export:
    """What was written: rows of the dataset read, conversations or other rows written, and what was left out."""

    out: Path
    read: int = 0
    rows: int = 0
    bad: int = 0
    layout: str = ""  # tree, or rows
    left_out: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "left_out": dict(self.left_out)}


def export(
    dataset: str,
    out: Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    messages_key: MessagesKey = "messages",
    lang: str | None = None,
    paths: Paths = "best",
    kind: Kind = "auto",
    names: FieldNames | None = None,
    quarantine: Path | None = None,
    force: bool = False,
    config: DataConfig | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Export:
    """Write rows of `dataset` (a Hub id, a directory or a file) to `out` as JSON lines in UTF-8.

    split: with slices, as `train[:1%]`. messages_key: the name that conversations are written under. lang: keep
    rows of this language only. paths: which conversations of a tree of messages; see `trees.conversations`.
    Raises DataError for a missing split or column, a bad row (unless there is a `quarantine`) and for an export
    of no row at all.
    """
    if file_kind(out) != "json":
        raise ConfigError(
            f"{out}: an export is JSON lines",
            "its name ends with .jsonl or .jsonl.gz",
            "export, then `trainway data convert` to Parquet or CSV",
        )
    config = config or DataConfig()
    local = Path(dataset).expanduser()
    check_output(out, [local], force=force)
    result = Export(out)
    source = _Source(dataset, split, subset, revision, names or FieldNames(), config)
    with open_quarantine(quarantine, [local, out], force=force) as aside:
        # without a row there is no output, and the quarantine is kept all the same
        with suppress(NothingWrittenError), open_writer(out, []) as write:
            for row in _rows(source, result, aside, lang, paths, kind, quarantine is None, progress):
                write(_under(row, messages_key))
                result.rows += 1
            if not result.rows:
                raise NothingWrittenError
        result.bad = aside.count
    if not result.rows:
        raise _nothing(source, result)
    return result


class _Source:
    """The rows of the split, with their columns; a single file is read by our own reader, all else by `datasets`."""

    def __init__(
        self,
        dataset: str,
        split: str,
        subset: str | None,
        revision: str | None,
        names: FieldNames,
        config: DataConfig,
    ) -> None:
        self.name = dataset
        self.split = split
        self.names = names
        self.columns: list[str] = []
        self._path = Path(dataset).expanduser()
        if self._path.is_file():
            if subset or revision:
                raise ConfigError(
                    f"{dataset} is a file: it has no subset and no revision", fix="leave them out"
                )
            self.columns = _table_columns(self._path)
            self._rows = _sliced(self._path, split, config, names)
        else:
            from trainway.data.hub import stream_rows

            hub = stream_rows(dataset, subset=subset, split=split, revision=revision)
            self.columns = hub.columns
            self._rows = _numbered(hub)

    def __iter__(self) -> Iterator[Row | BadRow]:
        first = next(self._rows, None)
        if first is None:
            return
        if not self.columns and isinstance(first, Row):
            self.columns = list(first.value)
        yield first
        yield from self._rows

    @property
    def path(self) -> Path:
        return Path(f"{self.name} {self.split}") if not self._path.is_file() else self._path

    def missing(self, what: str) -> DataError:
        """The error of a column that the dataset lacks, with those that it has."""
        return DataError(
            f"{self.name}: {what}",
            f"its columns are: {printable(', '.join(self.columns))}",
            "name the fields (--prompt-field, --completion-field, ...), or another dataset",
        )


def _rows(
    source: _Source,
    result: Export,
    aside: Quarantine,
    lang: str | None,
    paths: Paths,
    kind: Kind,
    is_strict: bool,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    def good() -> Iterator[Row]:
        for row in source:
            result.read += 1
            if result.read % 1000 == 0:
                progress("rows read", result.read, 0)
            if isinstance(row, BadRow):
                _set_aside(row, aside, is_strict)
            else:
                yield row

    rows = good()
    first = next(rows, None)
    if first is None:
        return
    if is_tree(source.columns):
        result.layout = "tree"
        values = (row.value for row in _chain(first, rows))
        yield from conversations(values, paths=paths, lang=lang, skipped=result.left_out)
        return
    result.layout = "rows"
    wanted = _language(source, lang)
    for row in _chain(first, rows):
        if wanted and str(row.value.get(wanted[0], "")).casefold() != wanted[1]:
            result.left_out["other language"] += 1
            continue
        try:
            yield reshape(parse_record(row.value, source.names, kind), None)
        except MalformedError as bad:
            if result.read == 1 and not bad.field and is_strict:
                raise source.missing(bad.reason) from None
            data = json_line(row.value).rstrip()
            reason = BadRecord(source.path, row.line, bad.field, bad.reason)
            _set_aside(BadRow(reason, data, len(data)), aside, is_strict)


def _language(source: _Source, lang: str | None) -> tuple[str, str] | None:
    if lang is None:
        return None
    column = next((name for name in LANGUAGE_COLUMNS if name in source.columns), None)
    if column is None:
        raise source.missing(f"--lang needs a column of {', '.join(LANGUAGE_COLUMNS)}")
    return column, lang.casefold()


def _set_aside(bad: BadRow, aside: Quarantine, is_strict: bool) -> None:
    if is_strict:
        raise DataError(
            str(bad.record),
            "the row is malformed; nothing was written",
            "correct it, or set such rows aside: --quarantine FILE",
        )
    aside.add(bad)


def _under(row: dict[str, Any], key: MessagesKey) -> dict[str, Any]:
    if key == "messages" or "messages" not in row:
        return row
    return {key if name == "messages" else name: value for name, value in row.items()}


def _nothing(source: _Source, result: Export) -> DataError:
    left_out = {**dict(result.left_out.most_common()), **({"malformed": result.bad} if result.bad else {})}
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
    read = f"{result.read:,} rows of {source.name} {source.split} were read"
    return DataError(
        "nothing to export: no row is left",
        f"{read}; left out: {reasons}" if reasons else read,
        "choose a larger slice, another split or another --lang",
    )


def _table_columns(path: Path) -> list[str]:
    """The columns of a table; of JSON lines none are known before its first row."""
    match file_kind(path):
        case "parquet":
            from trainway.data.parquet import column_names

            return column_names(path)
        case "csv":
            from trainway.data.csvfile import header_of

            return header_of(path)
        case _:
            return []


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row | BadRow]:
    from trainway.data.parquet import plain

    for number, row in enumerate(rows, 1):
        yield Row(plain(row), number, None)


def _sliced(path: Path, split: str, config: DataConfig, names: FieldNames) -> Iterator[Row | BadRow]:
    slices = parse_split(split)

    def rows() -> Iterator[Row | BadRow]:
        return read_rows(path, config.max_document_mib, json_columns=names.lists())

    count: int | None = None
    for part in slices:
        if part.name != "train":
            raise DataError(
                f"{path} has no split {part.name!r}", "a single file is the split train", "use --split train"
            )
        if part.needs_count and count is None:
            count = sum(1 for _ in rows())
        start, stop = part.rows(count)
        for number, row in enumerate(rows()):
            if stop is not None and number >= stop:
                break
            if number >= start:
                yield row


def _chain(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rows
