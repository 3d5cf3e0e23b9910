"""The file of set-aside rows: each bad row with its reason and its bytes, so that it can be mended and put back."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trainway.data.rows import BadRow
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_open


class Quarantine:
    """Takes bad rows; the file appears, complete, when the block of `open_quarantine` ends."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self.count = 0

    def add(self, bad: BadRow) -> None:
        self.count += 1
        if self._file is not None:
            self._file.write(json.dumps(quarantined(bad), ensure_ascii=False).encode("utf-8") + b"\n")


@contextmanager
def open_quarantine(
    path: Path | None, sources: Iterable[Path] = (), *, force: bool = False
) -> Iterator[Quarantine]:
    """Yield a quarantine; with `path` None it counts and keeps nothing. `sources`: files that it must not replace."""
    if path is None:
        yield Quarantine(None)
        return
    check_output(path, sources, force=force)
    with atomic_open(path) as file:
        yield Quarantine(file)


def quarantined(bad: BadRow) -> dict[str, Any]:
    """The entry of a bad row: its bytes are in `raw`, or, where they are no UTF-8, in `raw_base64`.

    Of a row too long to hold, `raw` is the beginning and `bytes` the length of the whole.
    """
    record = bad.record
    entry: dict[str, Any] = {
        "source": str(record.source),
        "line": record.line,
        "field": record.field,
        "reason": record.reason,
    }
    is_cut = bad.size > len(bad.raw)
    raw = bad.raw.rstrip(b"\r\n")
    try:
        # a cut may go through a character: what is left of it is no fault of the row's
        entry["raw"] = raw.decode("utf-8", errors="ignore" if is_cut else "strict")
    except UnicodeDecodeError:
        entry["raw_base64"] = base64.b64encode(raw).decode()
    if is_cut:
        entry["bytes"] = bad.size
    return entry


def check_output(path: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Raises ConfigError when an output would replace an input, or, unless `force`, anything; or has no directory."""
    if not path.parent.is_dir():
        raise ConfigError(
            f"cannot write {path}", f"the directory {path.parent} does not exist", "make it first"
        )
    if path.is_dir():
        raise ConfigError(f"cannot write {path}", "it is a directory", "name a file in it")
    if any(path.resolve() == source.resolve() for source in sources):
        raise ConfigError(f"{path} would replace the data that it is made from", fix="name another file")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already", fix="name another file, or add --force to replace it")


def bad_rows_error(count: int, rows: int, kept: Path | None) -> DataError:
    """The error that ends a verb which met bad rows; `kept` is the quarantine file."""
    return DataError(
        f"{count:,} of {rows:,} rows {'is' if count == 1 else 'are'} malformed",
        f"{kept} holds them" if kept else "they are named above",
        "correct them, or set them aside with `trainway data convert ... --quarantine FILE`",
    )
