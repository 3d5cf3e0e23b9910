"""Validation: every bad row by file, line, field and reason, and a summary of the good ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trainway.config.schema import DataConfig
from trainway.data.dedup import Deduplicator
from trainway.data.quarantine import open_quarantine
from trainway.data.records import FieldNames, Kind, Located, bad_row, read_records
from trainway.data.rows import BadRecord, BadRow, MalformedError, file_kind
from trainway.data.sources import find_sources
from trainway.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""
REPORT_BYTES = 4 << 20
ENCODED_AT_ONCE = 64


@dataclass
class Validation:
    """What was found. `rows` counts the good and the bad ones, `shapes` and the sums the good ones."""

    files: int = 0
    bytes: int = 0
    rows: int = 0
    bad: int = 0
    duplicates: int | None = None  # None: not looked for
    shapes: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    characters: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shapes": dict(sorted(self.shapes.items()))}


def validate(
    patterns: Sequence[str],
    *,
    config: DataConfig | None = None,
    kind: Kind = "auto",
    names: FieldNames | None = None,
    quarantine: Path | None = None,
    tokenizer: Path | None = None,
    max_length: int | None = None,
    dedup: bool = False,
    force: bool = False,
    on_bad: Callable[[BadRecord], None] = lambda bad: None,
    progress: Progress = lambda label, done, total: None,
) -> Validation:
    """Check every row of files, directories and patterns; `on_bad` is given each bad one as it is met.

    kind: the shape that rows must have; auto takes any, mixed in one file. quarantine: a file for the bad rows.
    tokenizer: rows are rendered and encoded as fine-tuning does it (config.chat_template or the tokenizer's own), and
    what the template refuses or drops is bad too; so is a row that cannot be made to fit max_length tokens.
    Raises DataError for a file that is missing, empty, corrupt or holds no rows, ConfigError for a template that cannot
    be had.
    """
    config = config or DataConfig()
    paths = find_rows(patterns, config)
    result = Validation(files=len(paths), bytes=sum(path.stat().st_size for path in paths))
    seen = Deduplicator() if dedup else None
    with open_quarantine(quarantine, paths, force=force) as aside:
        rows = read_all(paths, config, names, kind, progress=progress, label="validating")
        for row in _encoded(rows, tokenizer, config, max_length) if tokenizer else rows:
            result.rows += 1
            if isinstance(row, BadRow):
                aside.add(row)
                on_bad(row.record)
                continue
            record = row.record
            result.shapes[record.shape] += 1
            if record.shape == "text":
                result.characters += len(record.text)
            else:
                turns = record.turns()
                result.turns += len(turns)
                result.characters += sum([len(turn[1]) for turn in turns])
            if seen is not None:
                seen.is_new(record.content_key())
        result.bad = aside.count
    result.duplicates = seen.duplicates if seen else None
    return result


def _encoded(
    rows: Iterator[Located | BadRow], tokenizer: Path, config: DataConfig, max_length: int | None
) -> Iterator[Located | BadRow]:
    """The rows, in their order, with those that cannot be encoded turned into bad ones."""
    from trainway.data.chat import UNLIMITED, ChatEncoder, Refused
    from trainway.data.tokenizer import load_tokenizer

    encoder = ChatEncoder(load_tokenizer(tokenizer), config, max_length or UNLIMITED)
    while batch := list(islice(rows, ENCODED_AT_ONCE)):
        results = iter(encoder([row.record for row in batch if isinstance(row, Located)]))
        for row in batch:
            found = next(results) if isinstance(row, Located) else None
            if isinstance(row, Located) and isinstance(found, Refused):
                reason = found.why if found.reason == "malformed" else f"{found.reason}: {found.why}"
                yield bad_row(
                    row.record.row, row.source, row.line, row.raw, MalformedError(found.field, reason)
                )
            else:
                yield row


def find_rows(patterns: Sequence[str], config: DataConfig) -> list[Path]:
    """The files of rows that the patterns stand for. Raises DataError for what is missing, empty or plain text."""
    paths = [source.path for source in find_sources(patterns, config, setting="FILE")]
    for path in paths:
        if file_kind(path) == "text":
            raise DataError(
                f"{path}: plain text has no rows", "every text is fine as it is", "leave it out, or name rows"
            )
    return paths


def read_all(
    paths: Sequence[Path],
    config: DataConfig,
    names: FieldNames | None,
    kind: Kind,
    *,
    progress: Progress,
    label: str,
) -> Iterator[Located | BadRow]:
    """The records of several files, one after the other. Raises DataError for a file without any."""
    total = sum(path.stat().st_size for path in paths)
    before = 0
    for path in paths:
        size = path.stat().st_size
        done = shown = rows = 0
        for row in read_records(path, config.max_document_mib, names=names, kind=kind):
            rows += 1
            # of a compressed file more is read than it has, of Parquet nothing is known until its end
            done += row.size if isinstance(row, BadRow) else len(row.raw or b"")
            if done - shown > REPORT_BYTES:
                shown = done
                progress(label, before + min(size, done), total)
            yield row
        if not rows:
            raise DataError(f"{path}: holds no rows", "every line is blank", "restore it, or leave it out")
        before += size
        progress(label, before, total)
