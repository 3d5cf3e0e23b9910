"""What the sharder reads: documents of files or of a dataset, with a position to go on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import xxhash

from trainway.config.schema import DataConfig, ShardConfig
from trainway.data.fingerprint import sampled_hash
from trainway.data.sources import BadRecord, Document, Source, find_sources, read_documents
from trainway.errors import DataError
from trainway.files import atomic_write, read_json

SOURCES_FILE = ".sources.json"
"""Beside the manifest: the files read, so that one that changed can be named."""


class Input(Protocol):
    """A stream of documents that knows where it is."""

    name: str

    def fingerprint(self) -> dict[str, Any]:
        """What is read, as JSON; equal means unchanged."""

    def position(self) -> dict[str, Any]:
        """Where the next record is, as JSON."""

    def done(self) -> tuple[int, int]:
        """(bytes read, bytes in all); zeros when that is not known."""

    def __iter__(self) -> Iterator[Document | BadRecord]: ...


def open_input(settings: ShardConfig, root: Path, position: dict[str, Any] | None) -> Input:
    """The input that the settings name, at `position` or its beginning. Raises DataError and what it reads from."""
    if settings.dataset is not None:
        return DatasetInput(settings, position)
    config = DataConfig(
        text_field=settings.text_field,
        text_unit=settings.text_unit,
        max_document_mib=settings.max_document_mib,
    )
    sources = find_sources(settings.inputs, config, setting="--input", root=root)
    return FilesInput(sources, config, position)


class FilesInput:
    """Documents of local files, file after file; resumed in the file, after the records of it that were read."""

    def __init__(
        self, sources: Sequence[Source], config: DataConfig, position: dict[str, Any] | None = None
    ) -> None:
        self.name = f"{len(sources)} files" if len(sources) > 1 else str(sources[0].path)
        self.sources = sources
        self._config = config
        self._file: int = (position or {}).get("file", 0)
        self._records: int = (position or {}).get("records", 0)
        self._read = 0
        self._size = sum(source.size for source in sources)

    def files(self) -> list[list[Any]]:
        """[path, size, sampled hash] of each file."""
        return [[str(item.path), item.size, sampled_hash(item.path)] for item in self.sources]

    def fingerprint(self) -> dict[str, Any]:
        files = self.files()
        content = json.dumps([[size, digest] for _, size, digest in files])
        return {
            "files": len(files),
            "bytes": self._size,
            "hash": xxhash.xxh3_128_hexdigest(content.encode()),
        }

    def position(self) -> dict[str, Any]:
        return {"file": self._file, "records": self._records}

    def done(self) -> tuple[int, int]:
        before = sum(source.size for source in self.sources[: self._file])
        within = self.sources[self._file].size if self._file < len(self.sources) else 0
        return before + min(self._read, within), self._size

    def __iter__(self) -> Iterator[Document | BadRecord]:
        while self._file < len(self.sources):
            source = self.sources[self._file]
            records = read_documents(source.path, self._config, text_unit=source.text_unit)
            self._read = 0
            for record in islice(records, self._records, None):
                self._records += 1
                if type(record) is Document:
                    self._read += len(record.text)
                yield record
            self._file += 1
            self._records = 0


class DatasetInput:
    """Documents of a streamed Hugging Face dataset; a document's line is its row."""

    def __init__(self, settings: ShardConfig, position: dict[str, Any] | None = None) -> None:
        from trainway.data.hub import stream_rows

        assert settings.dataset is not None
        self.name = settings.dataset
        self._field = settings.text_field
        self._limit = settings.max_document_mib
        self._row: int = (position or {}).get("row", 0)
        self._place = Path(f"{settings.dataset}:{settings.split}")
        self._rows = stream_rows(
            settings.dataset,
            subset=settings.subset,
            split=settings.split,
            revision=settings.revision,
            state=(position or {}).get("rows"),
            columns=[settings.text_field],
        )

    def fingerprint(self) -> dict[str, Any]:
        return self._rows.source()

    def position(self) -> dict[str, Any]:
        return {"row": self._row, "rows": self._rows.state()}

    def done(self) -> tuple[int, int]:
        return 0, 0

    def __iter__(self) -> Iterator[Document | BadRecord]:
        for row in self._rows:
            self._row += 1
            text = row[self._field]
            reason = self._fault(text)
            if reason is None:
                yield Document(text, self._place, self._row)
            else:
                yield BadRecord(self._place, self._row, self._field, reason)

    def _fault(self, text: Any) -> str | None:
        if not isinstance(text, str):
            return "is empty" if text is None else f"is of type {type(text).__name__}, not a string"
        if not text or text.isspace():
            return "empty"
        if (at := text.find("\0")) >= 0:
            return f"holds a NUL character at character {at}"
        if len(text) > self._limit << 18 and len(text.encode("utf-8", "replace")) > self._limit << 20:
            return f"longer than max_document_mib ({self._limit} MiB)"
        return None


def remember_files(source: Input, folder: Path) -> None:
    """Note the files that are read, for `check_unchanged`."""
    if isinstance(source, FilesInput):
        atomic_write(folder / SOURCES_FILE, json.dumps(source.files()))


def check_unchanged(source: Input, before: dict[str, Any], folder: Path) -> None:
    """Raises DataError, naming what differs, unless `source` is what it was when the directory was begun."""
    if source.fingerprint() == before:
        return
    raise DataError(
        f"the source changed since {folder} was begun",
        _difference(source, before, folder),
        "restore it, or shard it anew into another directory",
    )


def _difference(source: Input, before: dict[str, Any], folder: Path) -> str:
    if not isinstance(source, FilesInput) or not (folder / SOURCES_FILE).is_file():
        return f"it was {before}, and is {source.fingerprint()}"
    old, new = read_json(folder / SOURCES_FILE), source.files()
    for number, (was, now) in enumerate(zip(old, new, strict=False)):
        if was[1:] != now[1:]:
            if was[0] != now[0]:
                return f"file {number + 1} was {was[0]}, and is {now[0]}"
            size = f"had {was[1]} bytes, and has {now[1]}" if was[1] != now[1] else "has another content"
            return f"{now[0]} {size}"
    return f"it had {len(old)} files, and has {len(new)}"
