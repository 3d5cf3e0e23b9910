"""The data: every file is there, not empty and unaltered, and its first row can be trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainway.config.mixes import train_sources
from trainway.config.schema import RunConfig
from trainway.data.records import FieldNames, read_records
from trainway.data.remote_sources import look_up
from trainway.data.rows import BadRecord, BadRow
from trainway.data.shards import SHARD_MANIFEST, check_shards
from trainway.data.sources import Source, find_sources, read_documents
from trainway.doctor.findings import Finding, failure, fault, is_offline, listed, ok, warning
from trainway.doctor.needs import hub_dataset, is_fetched
from trainway.errors import DataError, UserError
from trainway.files import read_json
from trainway.storage.address import is_remote

HASH_S = 60.0
"""Seconds that hashing may take here; preparation hashes all of it again."""

FIRST_FILES = 100
"""Files of one source whose first row is read: they are all made the same way, and a network disk opens them slowly."""


@dataclass(frozen=True)
class Wanted:
    """A source as the configuration names it."""

    setting: str
    path: str
    optional: bool


def check_data(
    config: RunConfig,
    environ: Mapping[str, str],
    *,
    hashes: bool,
    limit_s: float = HASH_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Finding]:
    """Every source that is missing, empty or altered, by name; then the first row of each file.

    hashes: compare shards with their manifest byte for byte, until `limit_s` is over; else by their sizes.
    """
    wanted = _wanted(config)
    offline = is_offline(environ)
    if not wanted:
        yield failure(
            "data",
            "data.train is empty",
            "there is nothing to train on",
            "name files: data.train=corpus.jsonl",
        )
        return
    until = clock() + limit_s
    sound = 0
    for source in wanted:
        dataset = hub_dataset(source.path, config)
        if dataset is None:
            findings = list(_check_source(source, config, hashes, until, clock))
        else:  # the preparation fetches it
            there = not offline or is_fetched(dataset, config, environ)
            findings = [] if there else [_not_fetched(source.path)]
        sound += not any(item.level == "failure" for item in findings)
        yield from findings
    if sound == len(wanted):
        yield ok("data", f"{len(wanted)} source{'s' * (len(wanted) > 1)} of data, all there")


def _check_source(
    wanted: Wanted, config: RunConfig, hashes: bool, until: float, clock: Callable[[], float]
) -> Iterator[Finding]:
    if is_remote(wanted.path):
        yield from _check_remote(wanted, config)
        return
    place = Path(wanted.path).expanduser()
    if wanted.optional and not place.exists():
        yield ok("data", f"{wanted.path} is absent, and optional")
        return
    if (place / SHARD_MANIFEST).is_file():
        manifest = _shard_list(place / SHARD_MANIFEST)
        if manifest is not None:
            yield from check_shard_folder(place, manifest, hashes=hashes, until=until, clock=clock)
            yield from _first_rows(_listed_files(place, manifest), config)
            return
    try:
        found = find_sources([wanted.path], config.data, setting=wanted.setting)
    except DataError as error:
        yield fault("data", error)
        return
    yield from _first_rows(found, config)


def _check_remote(wanted: Wanted, config: RunConfig) -> Iterator[Finding]:
    """Whether object storage can be reached, the login is good and something is there; the preparation fetches it."""
    try:
        files, size = look_up(wanted.path, Path(config.data.store_dir).expanduser())
    except DataError as error:
        if not wanted.optional:
            yield fault("data", error)
    except UserError as error:
        yield fault("data", error)
    else:
        yield ok("data", f"{wanted.path}: {files} files, {size / 2**20:,.1f} MiB")


def _not_fetched(path: str) -> Finding:
    return failure(
        "data",
        f"{path} is no file here, and no dataset of the Hub that was fetched before",
        f"HF_HUB_OFFLINE is set; looked for {Path(path).expanduser().absolute()}",
        "correct the path; or run `trainway prepare CONFIG` where there is a network, and bring data.store_dir along",
    )


def check_shard_folder(
    folder: Path,
    manifest: dict[str, Any],
    *,
    hashes: bool,
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Finding]:
    """Each shard by itself, so that all bad ones are named."""
    entries: list[Any] = manifest["shards"]
    if not entries:
        yield failure("data", f"{folder} holds no shards", "its manifest lists none", "make the shards again")
    unread = 0
    for entry in entries:
        if hashes and clock() < until:
            try:
                check_shards(folder, [], {**manifest, "shards": [entry], "complete": True})
            except DataError as error:
                yield fault("data", error)
        else:
            unread += 1
            yield from _compare_size(folder, entry)
    if manifest.get("complete") is False:
        yield warning(
            "data-complete",
            f"{folder}: the sharder has not finished",
            f"the {len(entries)} shards that it completed are used",
            "run the same `trainway data shard` command again to go on",
        )
    if hashes and unread:
        yield warning(
            "data-hashes",
            f"{folder}: {unread} of {len(entries)} shards were compared by their size alone",
            "hashing them all takes longer than the doctor may",
            "`trainway prepare CONFIG` compares every byte, on a machine without a GPU",
        )


def _compare_size(folder: Path, entry: Any) -> Iterator[Finding]:
    name, size = entry.get("file"), entry.get("bytes")
    path = folder / Path(str(name)).name
    cure = "restore it, or make the shards again"
    if not path.is_file():
        yield failure("data", f"{path}: the shard is missing", f"{folder / SHARD_MANIFEST} lists it", cure)
    elif (found := path.stat().st_size) != size:
        yield failure(
            "data", f"{path}: the shard was altered", f"{found} bytes; the manifest says {size}", cure
        )


def _first_rows(sources: Sequence[Source], config: RunConfig) -> Iterator[Finding]:
    bad: list[BadRecord] = []
    for source in sources[:FIRST_FILES]:
        try:
            record = _first_row(source.path, config, source.text_unit)
        except DataError as error:
            yield fault("first-row", error)
            continue
        if record is not None:
            bad.append(record)
    if not bad:
        return
    named = [
        f"{item.source}:{item.line}: {f'field {item.field!r}: ' if item.field else ''}{item.reason}"
        for item in bad
    ]
    what = f"the first row of {len(bad)} file{'s' * (len(bad) > 1)} cannot be trained on"
    fix = f"`trainway data validate {bad[0].source}` names every bad row; data.on_bad_record=quarantine leaves them out"
    if config.data.on_bad_record == "quarantine":
        yield warning("first-row", what, listed(named), fix)
    else:
        yield failure("first-row", what, listed(named), fix)


def _first_row(path: Path, config: RunConfig, text_unit: Any) -> BadRecord | None:
    """The fault of the first row, if it has one."""
    if config.recipe == "pretrain":
        for document in islice(read_documents(path, config.data, text_unit=text_unit), 1):
            return document if isinstance(document, BadRecord) else None
    else:
        names = FieldNames().named(text=config.data.text_field)
        own = names
        if config.recipe == "gad":
            own = names.named(content=config.data.prompt_field, teacher_response=config.data.response_field)
        kind = "auto" if own == names else "teacher"
        for row in islice(read_records(path, config.data.max_document_mib, names=own, kind=kind), 1):  # type: ignore[arg-type]
            return row.record if isinstance(row, BadRow) else None
    raise DataError(f"{path} holds no rows", "it has no line that is a record", "correct the path")


def _wanted(config: RunConfig) -> list[Wanted]:
    train = [Wanted("data.train", source.path, source.optional) for source in train_sources(config.data)]
    return train + [Wanted("data.validation", path, False) for path in config.data.validation]


def _shard_list(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory of shards; None for other JSON, which the search for files explains."""
    try:
        manifest = read_json(path)
    except DataError:
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("shards"), list) else None


def _listed_files(folder: Path, manifest: dict[str, Any]) -> list[Source]:
    """The first listed shard that is there: all have one form."""
    for entry in manifest["shards"]:
        path = folder / Path(str(entry.get("file"))).name
        if path.is_file() and path.stat().st_size:
            kind = "json" if ".jsonl" in path.name else "text"
            return [Source(path, kind, "line", path.stat().st_size)]  # type: ignore[arg-type]
    return []
