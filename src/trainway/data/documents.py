"""The documents of a preparation: streamed in order, each sent to its split, malformed ones listed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import xxhash

from trainway.config.schema import DataConfig, RunConfig
from trainway.data.dedup import Deduplicator
from trainway.data.inputs import InputFile
from trainway.data.rows import BadRecord
from trainway.data.sources import Document, Source, read_documents
from trainway.errors import DataError
from trainway.files import atomic_write

LISTED_RECORDS = 20


class HeldOut:
    """Decides by its text alone whether a training document is held out: duplicates stay on one side."""

    def __init__(self, config: RunConfig) -> None:
        self._seed = config.seed & (2**64 - 1)
        self._threshold = 0 if config.data.validation else int(config.data.val_ratio * 2**64)

    def __call__(self, text: bytes) -> bool:
        return self._threshold > 0 and xxhash.xxh3_64_intdigest(text, self._seed) < self._threshold


def split_texts(
    files: Sequence[InputFile],
    config: DataConfig,
    held_out: HeldOut,
    bad: list[BadRecord],
    report: Callable[[int], None],
    seen: Deduplicator | None = None,
) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes of text) of every document, in the order of the files.

    seen: training documents that it knows are left out; it counts them.
    """
    before = 0
    for file in files:
        read = 0
        for document in _documents(file.source, config, bad):
            data = document.text.encode()
            split = "val" if held_out(data) else file.split
            if seen is None or split == "val" or seen.is_new(data):
                yield split, document.text, len(data)
            if (read + len(data)) >> 22 > read >> 22:
                report(before + min(file.source.size, read))
            read += len(data)
        before += file.source.size
        report(before)


def sample_texts(
    sources: Sequence[Source], config: DataConfig, held_out: HeldOut, budget: int, bad: list[BadRecord]
) -> Iterator[str]:
    """About `budget` bytes of training text: from each file its share, from its beginning on."""
    share = budget / max(1, sum(source.size for source in sources))
    taken, allowed = 0, 0.0
    for source in sources:
        # A file's size says little about its text when it is compressed: all of a small corpus is allowed.
        allowed = budget if share >= 1 else allowed + source.size * share
        if taken >= allowed:
            continue
        for document in _documents(source, config, bad):
            data = document.text.encode()
            if not held_out(data):
                yield document.text
                taken += len(data)
                if taken >= allowed:
                    break


def refuse_bad_records(
    files: Sequence[InputFile], config: DataConfig, held_out: HeldOut, listing: Path
) -> None:
    """Raise DataError for all malformed records of the files, which are known to have some."""
    bad: list[BadRecord] = []
    deque(split_texts(files, config, held_out, bad, lambda done: None), maxlen=0)
    raise bad_records_error(bad, listing)


def bad_records_error(bad: list[BadRecord], listing: Path) -> DataError:
    """The error that names the first malformed records; all of them are written to `listing`."""
    atomic_write(listing, json_lines(bad))
    listed = [str(record) for record in bad[:LISTED_RECORDS]]
    if len(bad) > LISTED_RECORDS:
        listed.append(f"and {len(bad) - LISTED_RECORDS} more")
    return DataError(
        f"{len(bad)} malformed record{'s' if len(bad) > 1 else ''} in the data",
        "\n".join(listed),
        f"correct them ({listing} lists all), or set data.on_bad_record=quarantine to leave them out",
    )


def json_lines(bad: list[BadRecord]) -> str:
    """Malformed records as JSON lines: source, line, field, reason."""
    return "".join(json.dumps({**asdict(record), "source": str(record.source)}) + "\n" for record in bad)


def _documents(source: Source, config: DataConfig, bad: list[BadRecord]) -> Iterator[Document]:
    """The documents of a source; its bad records go to `bad`, and end the stream where they are errors.

    The file is read to its end all the same, so that `bad` is complete.
    """
    for record in read_documents(source.path, config, text_unit=source.text_unit):
        if isinstance(record, BadRecord):
            bad.append(record)
        elif not bad or config.on_bad_record == "quarantine":
            yield record
