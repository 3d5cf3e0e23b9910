"""How many rows an epoch has, where that is cheap to know: of a prepared store, or of the files themselves (no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.config.mixes import train_sources
from trainway.config.schema import RunConfig
from trainway.errors import DataError

MOST_BYTES = 256 << 20
"""Of JSON lines that are read to count them."""
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Rows of one pass over the training split, where the number is from, and how full the longest row is."""

    count: int
    source: str
    fill: float | None = None
    """Mean tokens of a padded row or of a prompt with its answer, as a share of the longest; None: not known."""


def known_rows(config: RunConfig) -> Rows | None:
    """The rows of the training split, from a prepared store of the same files, else counted; None where neither is
    cheap: other formats, files of more than 256 MiB, data on the Hub, sources that are not there."""
    files = _files(config)
    return None if files is None else _prepared(config, files) or _counted(config, files)


def _files(config: RunConfig) -> list[Path] | None:
    found: list[Path] = []
    for source in train_sources(config.data):
        path = Path(source.path).expanduser()
        if source.weight is not None or source.epochs not in (None, 1):
            return None  # the rows of a mix follow from more than its files
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.is_file())
        elif not source.optional:
            return None
    return found or None


def _prepared(config: RunConfig, files: list[Path]) -> Rows | None:
    """Of the newest store that was made of files of these names and sizes for the same recipe."""
    made = sorted(
        Path(config.data.store_dir).expanduser().glob("*/manifest.json"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    wanted = sorted((path.name, path.stat().st_size) for path in files)
    for path in made:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = [(Path(one["path"]).name, one["size"]) for one in manifest["sources"]["train"]]
            if sorted(sources) == wanted and (rows := _rows_of(config, manifest)):
                return Rows(rows[0], f"prepared in {path.parent}", rows[1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a store, or one that is being written
    return None


def _rows_of(config: RunConfig, manifest: dict[str, Any]) -> tuple[int, float | None] | None:
    """(rows, how full) of a store; None when it was made for another recipe."""
    split, length = manifest["splits"]["train"], config.train.seq_len
    tokens, documents = int(split["tokens"]), int(split["documents"])
    if (config.recipe == "pretrain") != (manifest.get("conversations") is None):
        return None
    if config.recipe == "pretrain":
        return tokens // length, None
    if config.recipe == "gad":
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        return documents, tokens / documents / longest
    if config.data.packing == "none":
        return documents, tokens / documents / length
    return max(1, -(-tokens // length)), None  # best fit leaves a percent or two of a row empty


def _counted(config: RunConfig, files: list[Path]) -> Rows | None:
    """Rows that are one record each: of gad, and of sft without packing."""
    if config.recipe == "pretrain" or (config.recipe == "sft" and config.data.packing != "none"):
        return None
    kinds = {path.suffix for path in files}
    if kinds == {".parquet"}:
        records = sum(_parquet_rows(path) for path in files)
    elif kinds <= {".jsonl", ".ndjson", ".json"} and sum(path.stat().st_size for path in files) <= MOST_BYTES:
        records = sum(_lines(path) for path in files)
    else:
        return None
    held_out = 0.0 if config.data.validation else config.data.val_ratio
    rows = round(records * (1 - held_out))
    return Rows(rows, f"{records:,} records in {len(files)} file{'s' * (len(files) > 1)}") if rows else None


def _parquet_rows(path: Path) -> int:
    from pyarrow import parquet

    try:
        rows: int = parquet.read_metadata(path).num_rows
    except ValueError as error:  # pyarrow's own is one
        raise DataError(
            f"{path}: not a Parquet file",
            str(error).partition(". ")[0],
            "bring the file again, or correct data.train",
        ) from None
    return rows


def _lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")
