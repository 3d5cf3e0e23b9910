"""Rows of a Hugging Face dataset, streamed: from the Hub, a directory or a data file, and resumed exactly."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from trainway.data.fingerprint import sampled_hash
from trainway.data.hub_errors import user_error
from trainway.data.splits import SplitSlice, parse_split
from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError
from trainway.logs import stage

BATCH_ROWS = 100
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HUGGINGFACE_HUB_TOKEN")
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
"""Reader of a single data file, by its suffix; each also with .gz."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def stream_rows(
    dataset: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    state: Mapping[str, Any] | None = None,
    token: str | None = None,
    columns: Sequence[str] | None = None,
) -> HubRows:
    """The rows of a split, or of slices of splits (`train[:1%]+test[:10]`), without loading them into memory.

    dataset: a Hub id, a local directory of data files, or the path or URL of one data file.
    state: what `HubRows.state()` gave: go on after the last row that had been taken then.
    token: of the Hub; empty means HF_TOKEN, HUGGINGFACEHUB_API_TOKEN or the saved login.
    columns: read these only.
    Raises DataError (not found, no such split or column, malformed, changed since `state`), ConfigError (a
    split or subset that cannot be), EnvironmentFault (`datasets` missing, no access, no network).
    """
    slices = parse_split(split)
    opened = _Dataset(dataset, subset, (state or {}).get("revision", revision), token)
    return HubRows(opened, slices, state, columns)


class HubRows:
    """Rows of a dataset, each a dict. One pass: iterating again goes on where the last iteration ended."""

    def __init__(
        self,
        dataset: _Dataset,
        slices: Sequence[SplitSlice],
        state: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._dataset = dataset
        self._slices = slices
        self._names = [item.name for item in slices]
        for name in self._names:
            dataset.check_split(name)
        first = dataset.stream(self._names[0])
        features = first.features or {}
        self.features: dict[str, str] = {name: _type_name(kind) for name, kind in features.items()}
        """Columns and their types, such as {"text": "string"}."""
        for column in columns or ():
            self.check_column(column)
        self._columns = list(columns) if columns is not None else None
        state = dict(state or {})
        self._counts: dict[str, int] = dict(state.get("counts", {}))
        self._slice: int = state.get("slice", 0)
        self._taken: int = state.get("taken", 0)  # rows of this slice
        self._position: Any = state.get("position")  # of the reader, before the batch in hand
        self._offset: int = state.get("offset", 0)  # rows taken of that batch
        self._batch: list[dict[str, Any]] = []
        self._hash: str | None = state.get("hash")
        if state.get("datasets") != dataset.version:
            self._position = None  # another version's state: the rows before are skipped instead

    @property
    def columns(self) -> list[str]:
        return list(self.features) if self._columns is None else list(self._columns)

    def check_column(self, name: str) -> None:
        """Raises DataError, with the columns that exist, nearest first, if `name` is not one."""
        if self.features and name not in self.features:
            raise DataError(
                f"{self._dataset.name} has no column {name!r}",
                f"its columns are: {', '.join(_nearest(name, self.features))}",
                "name one of them",
            )

    def source(self) -> dict[str, Any]:
        """What the rows are read from: the Hub's commit, or the files with size and a hash. Equal means unchanged."""
        return self._dataset.source(self._names)

    def state(self) -> dict[str, Any]:
        """Where the next row is, as JSON; for `stream_rows(state=)`."""
        digest = self._hash if not self._batch else _hash(self._batch[: self._offset])
        return {
            "revision": self._dataset.revision,
            "datasets": self._dataset.version,
            "counts": dict(self._counts),
            "slice": self._slice,
            "taken": self._taken,
            "position": self._position,
            "offset": self._offset,
            "hash": digest,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._slice < len(self._slices):
            start, stop = self._range(self._slices[self._slice])
            with self._dataset.faults():
                yield from self._rows(start, stop)
            self._slice += 1
            self._taken = self._offset = 0
            self._position, self._batch, self._hash = None, [], None

    def _range(self, part: SplitSlice) -> tuple[int, int | None]:
        if part.needs_count and part.name not in self._counts:
            self._counts[part.name] = self._dataset.count(part.name)
        return part.rows(self._counts.get(part.name))

    def _rows(self, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        wanted = None if stop is None else stop - start
        if wanted is not None and self._taken >= wanted:
            return
        stream = self._stream(start)
        batches = stream.iter(batch_size=BATCH_ROWS)
        for columns in batches:
            after = stream.state_dict()
            names = list(columns)
            self._batch = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            self._verify()
            for row in self._batch[self._offset :]:
                self._offset += 1
                self._taken += 1
                yield row
                if self._taken == wanted:
                    return
            self._position, self._offset = after, 0
        if self._offset:
            raise self._changed()

    def _stream(self, start: int) -> Any:
        """The rows from the beginning of the batch in hand on."""
        stream = self._dataset.stream(self._slices[self._slice].name)
        if self._columns is not None:
            stream = stream.select_columns(self._columns)
        if self._position is not None:
            stream = stream.skip(start) if start else stream
            stream.load_state_dict(self._position)
        elif skipped := start + self._taken - self._offset:
            stream = stream.skip(skipped)
        return stream

    def _verify(self) -> None:
        # 1) the position of the reader is only as exact as the reader 2) the data may have changed since
        if self._hash is not None and self._hash != _hash(self._batch[: self._offset]):
            raise self._changed()
        self._hash = None

    def _changed(self) -> DataError:
        return DataError(
            f"{self._dataset.name} changed since its rows were last read",
            f"the rows before row {self._taken:,} of {self._names[self._slice]!r} are not what they were",
            "restore it, or begin anew in another directory",
        )


class _Dataset:
    """A dataset that was found: its splits, its files, its errors in our words."""

    def __init__(self, name: str, subset: str | None, revision: str | None, token: str | None) -> None:
        self.name = name
        self._token = token or next((os.environ[key] for key in TOKEN_VARIABLES if os.environ.get(key)), None)
        self._library = _import_datasets()
        self.version: str = self._library.__version__
        arguments = self._where(name, subset, revision)
        with self.faults():
            self._builder = self._library.load_dataset_builder(**arguments, token=self._token)
            self._streams: Mapping[str, Any] = self._builder.as_streaming_dataset()

    def _where(self, name: str, subset: str | None, revision: str | None) -> dict[str, Any]:
        """Arguments of `load_dataset_builder`; sets `revision` to the commit that is read."""
        self.revision: str | None = None
        path = Path(name).expanduser()
        is_file = "://" in name or path.is_file()
        if is_file or path.is_dir():
            if revision is not None:
                raise ConfigError(
                    f"revision {revision!r} is set, and {name} is no dataset of the Hub", fix="leave it out"
                )
            if path.is_dir():
                return {"path": str(path.absolute()), "name": subset}
            if subset is not None:
                raise ConfigError(
                    f"subset {subset!r} is set, and {name} is a single file", fix="leave it out"
                )
            where = name if "://" in name else str(path.absolute())
            return {"path": _builder_of(name), "data_files": {"train": where}}
        if not _HUB_ID.fullmatch(name):
            raise DataError(
                f"the dataset {name} was not found",
                f"there is no such file or directory ({path.absolute()}), and it is no id of the Hub",
                "name a Hub id (OWNER/NAME), a directory of data files, or a data file",
            )
        self.revision = self._commit(name, revision)
        return {"path": name, "name": subset, "revision": self.revision or revision}

    def _commit(self, name: str, revision: str | None) -> str | None:
        """The commit of the Hub that `revision` means now, so that a resumed run reads the same one."""
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return None  # what the cache has is read, if it has it
        with self.faults():
            info = HfApi(token=self._token).dataset_info(name, revision=revision, timeout=30)
            return info.sha

    def check_split(self, name: str) -> None:
        if name not in self._streams:
            raise DataError(
                f"{self.name} has no split {name!r}",
                f"its splits are: {', '.join(_nearest(name, self._streams))}",
                "name one of them",
            )

    def stream(self, split: str) -> Any:
        """A fresh `IterableDataset` with known columns."""
        with self.faults():
            stream = self._builder.as_streaming_dataset(split=split)
            return stream if stream.features else stream._resolve_features()

    def count(self, split: str) -> int:
        """Rows of a split: from the dataset's card, from the footers of its Parquet files, or counted."""
        with self.faults():
            info = (self._builder.info.splits or {}).get(split)
            if info is not None and info.num_examples:
                return int(info.num_examples)
            files = self._files(split)
            if files and all(file.endswith(".parquet") for file in files):
                return sum(self._parquet_rows(file) for file in files)
            stage("DATA", f"counting the rows of {self.name} {split}: a slice needs their number")
            stream = self.stream(split)
            stream = stream.select_columns(stream.column_names[:1]).with_format("arrow")
            return sum(len(table) for table in stream.iter(batch_size=BATCH_ROWS))

    def source(self, splits: Iterable[str]) -> dict[str, Any]:
        if self.revision is not None:
            return {"dataset": self.name, "revision": self.revision}
        files: list[Any] = []
        for split in dict.fromkeys(splits):
            paths = self._files(split)
            origins = getattr(self._builder.config.data_files[split], "origin_metadata", [()] * len(paths))
            for path, origin in zip(paths, origins, strict=False):
                files.append([*_identity(path), *(map(str, origin) if "://" in path else ())])
        return {"dataset": self.name, "files": files}

    def _files(self, split: str) -> list[str]:
        data_files = self._builder.config.data_files or {}
        return [str(file) for file in data_files.get(split, ())]

    def _parquet_rows(self, file: str) -> int:
        import fsspec
        import pyarrow.parquet

        options = {"token": self._token} if file.startswith("hf://") else {}
        with fsspec.open(file, "rb", **options) as opened:
            return int(pyarrow.parquet.ParquetFile(opened).metadata.num_rows)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what goes wrong in the block into a UserError that names the dataset."""
        try:
            yield
        except (UserError, AssertionError, MemoryError):
            raise
        except Exception as error:
            raise user_error(self.name, error) from error


def _import_datasets() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            "reading a Hugging Face dataset needs the package `datasets`",
            str(error),
            "pip install 'trainway[hub]'",
        ) from None
    # another import of the libraries may have come before the variables above
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    return datasets


def _builder_of(name: str) -> str:
    plain = name.split("?")[0].lower().removesuffix(".gz")
    if "://" in name and plain.endswith(".txt"):  # the library's reader of text cannot open a URL
        raise DataError(f"{name}: plain text is not read from the web", fix="download it, and name the file")
    for suffix, builder in BUILDERS.items():
        if plain.endswith(suffix):
            return builder
    raise DataError(
        f"{name} is of an unknown kind",
        f"known kinds: {' '.join(BUILDERS)}, each also with .gz",
        "convert it",
    )


def _identity(path: str) -> list[Any]:
    local = Path(path)
    if local.is_file():
        return [local.name, local.stat().st_size, sampled_hash(local)]
    if not path.startswith("http"):
        return [path]
    import fsspec

    filesystem, where = fsspec.core.url_to_fs(path)
    found = filesystem.info(where)
    return [path, found.get("size"), *(str(found[key]) for key in ("ETag", "etag") if found.get(key))]


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def _type_name(kind: Any) -> str:
    name = getattr(kind, "dtype", None)
    return name if isinstance(name, str) else str(kind)


def _hash(rows: list[dict[str, Any]]) -> str:
    # what JSON cannot hold (an image, a date) is told apart by its type alone: its text may hold an address
    text = json.dumps(rows, default=lambda value: type(value).__name__)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
