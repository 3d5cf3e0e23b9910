"""The sharder's loop: takes documents from the input, hands them to the writers, commits when a shard is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from trainway.config.schema import ShardConfig
from trainway.data.shard_input import Input
from trainway.data.shard_manifest import Commit, settings_record, write_manifests
from trainway.data.shard_writer import ShardWriter, Written, return_to
from trainway.data.shards import QUARANTINE_FILE
from trainway.data.sources import BadRecord, Document
from trainway.errors import DataError, EnvironmentFault, Stopped, UserError
from trainway.files import disk_faults
from trainway.logs import stage, warn

_BOM = b"\xef\xbb\xbf"


class Sink:
    """The directories that are written, and their last commit."""

    def __init__(
        self, settings: ShardConfig, out: Path, val_out: Path | None, source: dict[str, Any], commit: Commit
    ) -> None:
        self.settings = settings
        self.out = out
        self.val_out = val_out
        self.source = source
        self.commit = commit

    @property
    def folders(self) -> list[Path]:
        return [self.out] if self.val_out is None else [self.out, self.val_out]

    def write_commit(self, commit: Commit) -> None:
        write_manifests(self.out, self.val_out, settings_record(self.settings), self.source, commit)
        self.commit = commit


def restore(sink: Sink) -> None:
    """Bring the directories back to their last commit: nothing is half, and the manifests are true."""
    commit = sink.commit
    # 1) manifests, as the validation one may be a commit ahead and list a shard that 2) becomes the one in hand
    try:
        sink.write_commit(commit)
        is_full = False
    except EnvironmentFault:
        is_full = True
    return_to(sink.out, commit.train)
    if sink.val_out is not None and commit.validation is not None:
        return_to(sink.val_out, commit.validation)
    _Quarantine(sink.out / QUARANTINE_FILE, commit.quarantine).close()
    if is_full:  # there is room now
        sink.write_commit(commit)


def pour(
    stream: Input, sink: Sink, stop: Callable[[], bool], progress: Callable[[str, int, int], None]
) -> None:
    """Read `stream` to its end. On any failure the directories are brought back to their last commit.

    Raises Stopped when `stop` says so, DataError for a malformed record (unless such are set aside) and for a
    source without any document.
    """
    work = _Pouring(stream, sink)
    try:
        work.run(stop, progress)
    except BaseException:
        work.close()
        with suppress(OSError, UserError):  # the next run does the same before it goes on
            restore(sink)
        raise


class _Pouring:
    def __init__(self, stream: Input, sink: Sink) -> None:
        self.stream = stream
        self.sink = sink
        self.settings = sink.settings
        self.train = self._writer(sink.out, sink.commit.train)
        self.validation = None
        if sink.val_out is not None and sink.commit.validation is not None:
            self.validation = self._writer(sink.val_out, sink.commit.validation)
        self.quarantine = _Quarantine(sink.out / QUARANTINE_FILE, sink.commit.quarantine)

    def run(self, stop: Callable[[], bool], progress: Callable[[str, int, int], None]) -> None:
        settings, train, validation = self.settings, self.train, self.validation
        seed, threshold = settings.seed & (2**64 - 1), int(settings.val_ratio * 2**64)
        take = settings.take if settings.mode == "smoke" else None
        documents = iter(self.stream)
        while take is None or train.total_lines < take:
            record = next(documents, None)
            if record is None:
                break
            checked = record if isinstance(record, BadRecord) else self._utf8(record)
            if isinstance(checked, BadRecord):
                self._set_aside(checked)
            else:
                text, data = checked
                # the same text goes to the same side, as when `prepare` holds documents out
                held_out = validation is not None and xxhash.xxh3_64_intdigest(data, seed) < threshold
                writer = validation if validation is not None and held_out else train
                writer.add(text, data)
                if writer.lines >= settings.lines_per_shard:
                    self._commit(writer)
                    progress("sharding", *self.stream.done())
            if stop():
                shards = len(self.sink.commit.train.shards)
                raise Stopped(saved=f"{shards} complete shards are in {self.sink.out}")
        self._finish()

    def close(self) -> None:
        for writer in self._writers():
            writer.close()
        self.quarantine.close()

    def _writer(self, folder: Path, written: Written) -> ShardWriter:
        return ShardWriter(folder, written, style=self.settings.format, gzip=self.settings.gzip)

    def _writers(self) -> list[ShardWriter]:
        return [self.train] if self.validation is None else [self.train, self.validation]

    def _utf8(self, document: Document) -> tuple[str, bytes] | BadRecord:
        """The text and its bytes; in a text shard without byte order mark, which a reader would take away."""
        text = document.text
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            reason = f"holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            return BadRecord(document.source, document.line, self.settings.text_field, reason)
        if data[:3] == _BOM and self.settings.format == "text":
            text = text.lstrip("\ufeff")
            if not text or text.isspace():
                return BadRecord(document.source, document.line, self.settings.text_field, "empty")
            data = text.encode()
        return text, data

    def _set_aside(self, bad: BadRecord) -> None:
        if self.settings.on_bad_record == "error":
            raise DataError(
                f"a record is malformed: {bad}",
                f"{len(self.sink.commit.train.shards)} complete shards are in {self.sink.out}",
                "--on-bad-record quarantine goes on and sets such records aside; a corrected source is a changed "
                "one, to be sharded anew into another directory",
            )
        self.quarantine.add(bad)

    def _commit(self, full: ShardWriter) -> None:
        for writer in self._writers():
            if writer is full:
                writer.finish()
            else:
                writer.flush()
        self._write(self.stream.position(), complete=False)
        last = full.written().shards[-1]
        stage(
            "DATA",
            f"{full.folder / last['file']}: {last['lines']:,} documents, {last['bytes'] / 1e6:,.1f} MB",
        )

    def _finish(self) -> None:
        if not self.train.total_lines:
            where = self.stream.name
            raise DataError(
                f"there is no document for {self.sink.out}",
                f"{where} holds none" + (", or all were held out" if self.validation else ""),
                "check the source",
            )
        if self.validation is not None and not self.validation.total_lines:
            warn(f"no document was held out for {self.sink.val_out}: raise --val-ratio")
        for writer in self._writers():
            writer.finish()
        self._write(None, complete=True)

    def _write(self, position: dict[str, Any] | None, *, complete: bool) -> None:
        validation = self.validation.written() if self.validation else None
        quarantine = self.quarantine.flush()
        before = self.sink.commit.train.line_breaks
        self.sink.write_commit(Commit(self.train.written(), validation, quarantine, position, complete))
        if not before and self.sink.commit.train.line_breaks:
            warn("line breaks inside documents become spaces: --format jsonl keeps them")


class _Quarantine:
    """The file of malformed records, appended to; on a resume it is cut back to the commit."""

    def __init__(self, path: Path, committed: dict[str, Any] | None) -> None:
        self._path = path
        self._digest = xxhash.xxh3_128()
        self._bytes: int = committed["bytes"] if committed else 0
        self._records: int = committed["records"] if committed else 0
        self._file: FileIO | None = None
        with disk_faults(path):
            if committed is None:
                path.unlink(missing_ok=True)
                return
            if not path.is_file() or path.stat().st_size < self._bytes:
                raise self._damaged()
            os.truncate(path, self._bytes)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                self._digest.update(block)
        if self._digest.hexdigest() != committed["hash"]:
            raise self._damaged()

    def add(self, bad: BadRecord) -> None:
        line = json.dumps({**asdict(bad), "source": str(bad.source)}, ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "backslashreplace")
        with disk_faults(self._path):
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close
            self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)
        self._records += 1

    def flush(self) -> dict[str, Any] | None:
        if not self._records:
            return None
        if self._file is not None:
            with disk_faults(self._path):
                os.fsync(self._file.fileno())
        digest = self._digest.hexdigest()
        return {"file": self._path.name, "records": self._records, "bytes": self._bytes, "hash": digest}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _damaged(self) -> DataError:
        return DataError(
            f"{self._path}: the list of malformed records was altered", fix="restore it, or shard anew"
        )
