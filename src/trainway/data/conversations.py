"""Conversations of a preparation: records to tokens and targets in the store; every row left out is named."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainway.config.schema import RunConfig
from trainway.data.chat import ChatEncoder, Encoded, Refused
from trainway.data.dedup import Deduplicator
from trainway.data.documents import LISTED_RECORDS, HeldOut
from trainway.data.inputs import InputFile
from trainway.data.records import FieldNames, Kind, Record, read_records
from trainway.data.rows import BadRecord, BadRow
from trainway.data.store import LEFT_OUT, StoreWriter
from trainway.errors import DataError

BATCH_BYTES = 1 << 20
BATCH_ROWS = 1024
ENCODER_THREADS = 2
"""Rendering holds the interpreter and tokenising does not: one batch is rendered while another is tokenised."""
REPORT_BYTES = 4 << 20


@dataclass
class Tally:
    """What became of the rows of a preparation."""

    bad: list[BadRecord] = field(default_factory=list)
    duplicates: int = 0
    too_long: int = 0  # rows left out, or errors: see data.over_length
    truncated: int = 0  # rows that lost turns or were cut
    turns_left_out: int = 0
    cut: int = 0  # rows of which a text was cut


def write_conversations(
    files: Sequence[InputFile],
    config: RunConfig,
    encoder: ChatEncoder,
    writer: StoreWriter,
    report: Callable[[int], None],
) -> Tally:
    """Encode the rows of `files`, in order, into `writer`, whose directory gets the list of those left out.

    Malformed rows are only gathered; once one of them is an error nothing more is written, and the files are read to
    their end all the same, so that all are found in one pass.
    Raises DataError for a file without rows, and for rows that are too long, where that is an error.
    """
    seen = Deduplicator() if config.data.dedup else None
    path = writer.path / LEFT_OUT
    tally = Tally()
    with path.open("w", encoding="utf-8") as left_out:
        sink = _Sink(config, writer, tally, _Listing(left_out.write))
        for batch, results in _encoded(_batches(_rows(files, config, seen, report)), encoder):
            sink.take(batch, results)
    if not path.stat().st_size:
        path.unlink()
    tally.duplicates = seen.duplicates if seen else 0
    return tally


def longest_row(config: RunConfig) -> int:
    """The most tokens that a row may have; of gad's, prompt and answer together."""
    if config.recipe == "gad":
        return config.data.max_prompt_tokens + config.data.max_response_tokens
    return config.train.seq_len


def refuse_too_long(tally: Tally, listed: Path, listing: Path, config: RunConfig) -> None:
    """Raise DataError for the rows that are too long, if any; their list `listed` becomes `listing`."""
    if not tally.too_long:
        return
    os.replace(listed, listing)
    entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    named = [f"{entry['source']}:{entry['line']}: {entry['why']}" for entry in entries[:LISTED_RECORDS]]
    if tally.too_long > LISTED_RECORDS:
        named.append(f"and {tally.too_long - LISTED_RECORDS} more")
    limits = {"train.seq_len": config.train.seq_len}
    if config.recipe == "gad":
        data = config.data
        limits = {
            "data.max_prompt_tokens": data.max_prompt_tokens,
            "data.max_response_tokens": data.max_response_tokens,
        }
    longer = " or ".join(f"{name} {limit}" for name, limit in limits.items())
    raise DataError(
        f"{tally.too_long} row{'s are' if tally.too_long > 1 else ' is'} longer than {longer}",
        "\n".join(named),
        f"shorten them ({listing} lists all), raise {' or '.join(limits)}, or set data.over_length to truncate or drop",
    )


class _Row(NamedTuple):
    """A record on its way into a split of the store."""

    split: str
    record: Record
    source: Path
    line: int


def _rows(
    files: Sequence[InputFile],
    config: RunConfig,
    seen: Deduplicator | None,
    report: Callable[[int], None],
) -> Iterator[_Row | BadRecord]:
    held_out = HeldOut(config)
    names, kind = _expected(config)
    before = 0
    for file in files:
        rows = done = shown = 0
        for row in read_records(file.source.path, config.data.max_document_mib, names=names, kind=kind):
            rows += 1
            done += row.size if isinstance(row, BadRow) else len(row.raw or b"")
            if done - shown > REPORT_BYTES:
                shown = done
                report(before + min(file.source.size, done))
            if isinstance(row, BadRow):
                yield row.record
                continue
            key = row.record.content_key()
            split = "val" if held_out(key) else file.split
            if seen is None or split == "val" or seen.is_new(key):
                yield _Row(split, row.record, row.source, row.line)
        if not rows:
            raise DataError(
                f"{file.source.path}: holds no rows", "every line is blank", "restore it, or leave it out"
            )
        before += file.source.size
        report(before)


def _expected(config: RunConfig) -> tuple[FieldNames, Kind]:
    """The names of the fields, and the shape that rows must have."""
    data = config.data
    names = FieldNames().named(text=data.text_field)
    if config.recipe != "gad":
        return names, "auto"
    own = names.named(content=data.prompt_field, teacher_response=data.response_field)
    # who names the fields has rows of them: others that are there, such as `messages`, do not count then
    return own, "auto" if own == names else "teacher"


def _batches(rows: Iterator[_Row | BadRecord]) -> Iterator[list[_Row | BadRecord]]:
    batch: list[_Row | BadRecord] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _text_bytes(row.record) if isinstance(row, _Row) else 0
        if size > BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[_Row | BadRecord]], encoder: ChatEncoder
) -> Iterator[tuple[list[_Row | BadRecord], list[Encoded | Refused]]]:
    """Each batch, in order, with what the encoder makes of its records; others are encoded meanwhile."""
    pending: deque[tuple[list[_Row | BadRecord], Future[list[Encoded | Refused]]]] = deque()
    with ThreadPoolExecutor(ENCODER_THREADS, "encoder") as threads:
        try:
            for batch in batches:
                if len(pending) > ENCODER_THREADS:
                    done, future = pending.popleft()
                    yield done, future.result()
                records = [row.record for row in batch if isinstance(row, _Row)]
                pending.append((batch, threads.submit(encoder, records)))
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


class _Listing(NamedTuple):
    """The list of rows that were left out or shortened, one JSON object a line."""

    write: Callable[[str], Any]

    def add(self, row: _Row, **facts: Any) -> None:
        entry = {"source": str(row.source), "line": row.line, **facts}
        self.write(json.dumps(entry, ensure_ascii=False) + "\n")


class _Sink:
    """Puts what the encoder made into the store, the tally and the list."""

    def __init__(self, config: RunConfig, writer: StoreWriter, tally: Tally, listing: _Listing) -> None:
        self._bad_is_error = config.data.on_bad_record == "error"
        self._long_is_error = config.data.over_length == "error"
        self._writer = writer
        self._tally = tally
        self._listing = listing

    def take(self, batch: Sequence[_Row | BadRecord], results: Sequence[Encoded | Refused]) -> None:
        made = iter(results)
        kept: dict[str, list[tuple[_Row, Encoded]]] = {}
        for row in batch:
            if isinstance(row, BadRecord):
                self._tally.bad.append(row)
                continue
            result = next(made)
            if isinstance(result, Refused):
                self._refuse(row, result)
            else:
                self._note(row, result)
                kept.setdefault(row.split, []).append((row, result))
        tally = self._tally
        if (tally.bad and self._bad_is_error) or (tally.too_long and self._long_is_error):
            return
        for split, rows in kept.items():
            self._append(split, rows)

    def _refuse(self, row: _Row, refused: Refused) -> None:
        if refused.reason == "malformed":
            self._tally.bad.append(BadRecord(row.source, row.line, refused.field, refused.why))
        else:
            self._tally.too_long += 1
            self._listing.add(row, reason=refused.reason, why=refused.why)

    def _note(self, row: _Row, encoded: Encoded) -> None:
        if not (encoded.left_out or encoded.cut):
            return
        self._tally.truncated += 1
        self._tally.turns_left_out += encoded.left_out
        self._tally.cut += encoded.cut
        facts = {"turns_left_out": encoded.left_out, "cut": bool(encoded.cut), "tokens": len(encoded.tokens)}
        self._listing.add(row, reason="truncated", **facts)

    def _append(self, split: str, rows: Sequence[tuple[_Row, Encoded]]) -> None:
        lengths = np.array([len(encoded.tokens) for _, encoded in rows], dtype=np.int64)
        mask = np.concatenate([encoded.trained for _, encoded in rows])
        mask[np.cumsum(lengths) - lengths] = False  # a row's first token is predicted by nothing
        self._writer.append(
            split,
            np.concatenate([encoded.tokens for _, encoded in rows]),
            lengths,
            sum(_text_bytes(row.record) for row, _ in rows),
            mask,
        )


def _text_bytes(record: Record) -> int:
    return sum(len(text.encode()) for _, text in record.texts())
