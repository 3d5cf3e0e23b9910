"""The sharder: a stream of documents becomes directories of text shards; interrupted, it goes on and loses nothing."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainway.checkpoint.lock import directory_lock
from trainway.config.schema import ShardConfig
from trainway.data.shard_input import FilesInput, Input, check_unchanged, open_input, remember_files
from trainway.data.shard_manifest import Commit, check_same_settings, read_manifest, settings_record
from trainway.data.shard_pour import Sink, pour, restore
from trainway.data.shard_writer import Written, is_leftover
from trainway.data.shards import QUARANTINE_FILE, SHARD_MANIFEST, check_shards
from trainway.errors import ConfigError
from trainway.files import read_json
from trainway.logs import stage

LOCK_FILE = ".lock"

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""


@dataclass(frozen=True)
class ShardReport:
    """What the directories hold. Totals are {"shards", "lines", "bytes", "text_bytes", "line_breaks_replaced"}."""

    out: Path
    train: dict[str, int]
    val_out: Path | None
    validation: dict[str, int] | None
    quarantined: int
    resumed_lines: int
    """Documents that an earlier run had written already."""
    cached: bool
    """Everything was there already, and was verified."""


def shard_settings(values: Mapping[str, Any]) -> ShardConfig:
    """The settings with these values, the others at their defaults. Raises ConfigError for a value that cannot be."""
    try:
        return ShardConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise ConfigError(
            f"--{name.replace('_', '-')} is {first['input']!r}",
            f"it must be {first['msg'].replace('Input should be ', '').removeprefix('a valid ')}",
            ShardConfig.model_fields[name].description or "",
        ) from None


def shard(
    settings: ShardConfig,
    *,
    root: Path | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> ShardReport:
    """Write the shards, go on with those that an interrupted run left, or verify the ones that are complete.

    Relative paths are below `root` (the working directory). `stop` is asked after every document.
    Raises Stopped when `stop` says so; ConfigError for settings that contradict each other or those that the
    directory was begun with; DataError for a malformed, missing or changed source and for damaged shards;
    EnvironmentFault when another sharder works in the directory, or the disk or the network fails.
    """
    root = root or Path.cwd()
    out, val_out = _directories(settings, root)
    _check_settings(settings)
    _check_apart(settings, root, out, val_out)
    # a source that is not there leaves no empty directory behind
    stream = None if out.exists() else open_input(settings, root, None)
    folders = [out] if val_out is None else [out, val_out]
    with ExitStack() as locks:
        for folder in sorted(folders):
            lock = directory_lock(folder, folder / LOCK_FILE, what="shard directory", setting="--out")
            locks.enter_context(lock)
        sink, stream = _open(settings, root, out, val_out, stream)
        resumed = _lines(sink.commit)
        if stream is not None:
            pour(stream, sink, stop or (lambda: False), progress or (lambda label, done, total: None))
        return _report(sink, resumed, cached=stream is None)


def _open(
    settings: ShardConfig, root: Path, out: Path, val_out: Path | None, stream: Input | None
) -> tuple[Sink, Input | None]:
    """The directories, begun or verified and brought back to their last commit, and what is left to read (None:
    they are complete). `stream` is the input at its beginning, if it was opened already."""
    before = read_manifest(out, val_out)
    if before is None or before[1].is_empty:
        stream = stream or open_input(settings, root, None)
        _check_inputs(stream, out, val_out)
        return _begin(settings, stream, out, val_out, before[0] if before else None), stream
    manifest, commit = before
    _check_same(settings, out, val_out, manifest, commit)
    sink = Sink(settings, out, val_out, manifest["source"], commit)
    if commit.complete and "revision" in manifest["source"]:
        _verify(sink)  # a commit of the Hub cannot change: no network is needed
        return sink, None
    stream = open_input(settings, root, commit.position)
    check_unchanged(stream, manifest["source"], out)
    if not commit.complete:
        restore(sink)
    _verify(sink)
    if commit.complete:
        return sink, None
    stage("DATA", f"{out}: going on after {_lines(commit):,} documents")
    return sink, stream


def _begin(
    settings: ShardConfig, stream: Input, out: Path, val_out: Path | None, before: dict[str, Any] | None
) -> Sink:
    """Take the directories: they are empty, or hold what an earlier run left before its first commit."""
    for folder in (out, val_out):
        if folder is None:
            continue
        ours = ("shard-00000.", SHARD_MANIFEST, QUARANTINE_FILE) if _is_ours(folder, before) else ()
        names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        strangers = sorted(name for name in names if not name.startswith(ours) and not is_leftover(name))
        if strangers:
            raise ConfigError(
                f"{folder} is not empty", f"it holds {', '.join(strangers[:5])}", "choose another directory"
            )
    validation = None if val_out is None else Written()
    commit = Commit(Written(), validation, quarantine=None, position=None, complete=False)
    sink = Sink(settings, out, val_out, stream.fingerprint(), commit)
    restore(sink)
    remember_files(stream, out)
    stage("DATA", f"sharding {stream.name} into {out}")
    return sink


def _is_ours(folder: Path, before: dict[str, Any] | None) -> bool:
    """Whether the directory belongs to the run whose manifest is `before`."""
    if before is None or not (folder / SHARD_MANIFEST).exists():
        return False
    found = read_json(folder / SHARD_MANIFEST)
    return isinstance(found, dict) and all(found.get(key) == before[key] for key in ("settings", "source"))


def _check_same(
    settings: ShardConfig, out: Path, val_out: Path | None, manifest: dict[str, Any], commit: Commit
) -> None:
    check_same_settings(out, manifest["settings"], settings_record(settings))
    if val_out is not None and not _is_ours(val_out, manifest):
        raise ConfigError(
            f"{val_out} belongs to another sharding than {out}",
            fix="name the --val-out that it was begun with",
        )
    if commit.quarantine and settings.on_bad_record == "error":
        raise ConfigError(
            "--on-bad-record is error",
            f"{commit.quarantine['records']} malformed records were set aside in {out} already",
            "go on with --on-bad-record quarantine",
        )


def _directories(settings: ShardConfig, root: Path) -> tuple[Path, Path | None]:
    out = root / Path(settings.out).expanduser()
    if settings.mode != "split":
        return out, None
    if settings.val_out is not None:
        return out, root / Path(settings.val_out).expanduser()
    return out, out.with_name("val" if out.name == "train" else f"{out.name}-val")


def _check_settings(settings: ShardConfig) -> None:
    if bool(settings.inputs) == (settings.dataset is not None):
        raise ConfigError(
            "there is no source" if not settings.inputs else "there are two sources",
            "--input names local files, --dataset a Hugging Face dataset",
            "give one of them",
        )
    ignored = {
        "take": settings.mode != "smoke" and "only mode smoke takes a sample",
        "val_ratio": settings.mode != "split" and "only mode split holds documents out",
        "val_out": settings.mode != "split" and "only mode split holds documents out",
        "seed": settings.mode != "split" and "only mode split decides anything by it",
        "subset": settings.dataset is None and "it is a dataset's",
        "revision": settings.dataset is None and "it is a dataset's",
        "split": settings.dataset is None and "it is a dataset's",
        "text_unit": settings.dataset is not None and "a row of a dataset is a document",
    }
    for name, reason in ignored.items():
        if reason and name in settings.model_fields_set:
            raise ConfigError(f"--{name.replace('_', '-')} would be ignored", reason, "leave it out")


def _check_apart(settings: ShardConfig, root: Path, out: Path, val_out: Path | None) -> None:
    """A directory inside another one would be read as a part of it."""
    named = [
        *settings.inputs,
        *([settings.dataset] if settings.dataset and "://" not in settings.dataset else []),
    ]
    paths = [root / Path(name).expanduser() for name in named if not glob.has_magic(name)]
    for folder in (out, val_out):
        others = [path for path in paths if path.exists()] + ([val_out] if val_out and folder == out else [])
        for other in others if folder is not None else []:
            one, two = folder.resolve(), other.resolve()  # type: ignore[union-attr]
            if one == two or one in two.parents or two in one.parents:
                raise ConfigError(
                    f"{folder} and {other} lie inside each other",
                    "what is written would be read again, or mixed with the other",
                    "choose another directory",
                )


def _check_inputs(stream: Input, out: Path, val_out: Path | None) -> None:
    folders = {folder.resolve() for folder in (out, val_out) if folder is not None}
    for source in stream.sources if isinstance(stream, FilesInput) else ():
        if folders & set(source.path.resolve().parents):
            raise ConfigError(
                f"{source.path} is in the directory that is written to", fix="choose another --out"
            )


def _verify(sink: Sink) -> None:
    for folder in sink.folders:
        check_shards(folder, sorted(folder.glob("shard-*")))


def _lines(commit: Commit) -> int:
    parts = [commit.train] if commit.validation is None else [commit.train, commit.validation]
    return sum(part.totals()["lines"] + part.tail.lines for part in parts)


def _report(sink: Sink, resumed: int, *, cached: bool) -> ShardReport:
    commit = sink.commit
    return ShardReport(
        out=sink.out,
        train=commit.train.totals(),
        val_out=sink.val_out,
        validation=None if commit.validation is None else commit.validation.totals(),
        quarantined=commit.quarantine["records"] if commit.quarantine else 0,
        resumed_lines=resumed,
        cached=cached,
    )
