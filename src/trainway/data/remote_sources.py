"""Sources in object storage: fetched once into the cache, verified, and files from then on."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path

import xxhash

from trainway.config.schema import DataConfig, SourceConfig
from trainway.data.rows import file_kind
from trainway.data.shards import SHARD_MANIFEST
from trainway.data.turns import Progress, turn
from trainway.errors import DataError
from trainway.files import atomic_write, hash_file, read_json
from trainway.logs import stage
from trainway.storage.address import is_remote, parse_address
from trainway.storage.retry import Backoff
from trainway.storage.store import Entry, Store, open_store
from trainway.storage.transfer import fetch

REMOTE_DIR = ".remote"
FILES = "files"
ORIGIN = "origin.json"
"""Written last: which objects were fetched, with the store's ETag and our hash of each."""


def with_fetched_sources(data: DataConfig, cache: Path, report: Progress) -> DataConfig:
    """`data` with a path in the cache in place of each s3:// or gs:// address.

    An address may be an object, a directory or a pattern, as a local path may. What was fetched before is taken as it
    is, without the network. Raises DataError when an address holds nothing or its objects are altered on the way,
    ConfigError for one with a login in it, EnvironmentFault when the store cannot be reached.
    """
    train: list[str | SourceConfig] = []
    for entry in data.train:
        path = entry if isinstance(entry, str) else entry.path
        if not is_remote(path):
            train.append(entry)
        elif isinstance(entry, str):
            train.append(_fetched(path, cache, report, optional=False))
        else:
            there = _fetched(path, cache, report, optional=entry.optional)
            train.append(entry.model_copy(update={"path": there, "name": entry.name or path}))
    validation = tuple(
        _fetched(path, cache, report, optional=False) if is_remote(path) else path for path in data.validation
    )
    if tuple(train) == tuple(data.train) and validation == tuple(data.validation):
        return data
    return data.model_copy(update={"train": tuple(train), "validation": validation})


def look_up(path: str, cache: Path) -> tuple[int, int]:
    """Files and bytes that an address stands for: by what was fetched before, else by the store's listing.

    Raises as `with_fetched_sources`, but fetches nothing.
    """
    sizes, _ = object_sizes(path, cache)
    if not sizes:
        raise _nothing_there(str(parse_address(path)))
    return len(sizes), sum(sizes.values())


def object_sizes(path: str, cache: Path, backoff: Backoff | None = None) -> tuple[dict[str, int], bool]:
    """(bytes of each object by its name, whether they were fetched before), as `look_up`; empty for an address of nothing."""
    address = str(parse_address(path))
    origin = _folder(address, cache) / ORIGIN
    if origin.exists():
        return {file["name"]: file["size"] for file in read_json(origin)["files"]}, True
    base, pattern = _split(address)
    return {name: entry.size for name, entry in _wanted(open_store(base, backoff), pattern).items()}, False


def _folder(address: str, cache: Path) -> Path:
    return cache / REMOTE_DIR / xxhash.xxh3_64_hexdigest(address.encode())


def _nothing_there(address: str) -> DataError:
    return DataError(
        f"{address} holds no data",
        "no object of that name or below it is of a known kind",
        "correct the address, or bring the data there",
    )


def _fetched(path: str, cache: Path, report: Progress, *, optional: bool) -> str:
    """The local path that stands for an address, in the cache."""
    address = str(parse_address(path))
    folder = _folder(address, cache)
    base, pattern = _split(address)
    # the files' own names, for errors and for what a name tells of a file's kind
    local = (
        str(Path(glob.escape(str(folder.absolute()))) / FILES / pattern)
        if glob.has_magic(pattern)
        else str(folder.absolute() / FILES / pattern)
    )
    with turn(folder.with_name(f"{folder.name}.lock"), report):
        if not (folder / ORIGIN).exists() and not _fetch(address, base, pattern, folder, report):
            if optional:
                return local
            raise _nothing_there(address)
    origin = read_json(folder / ORIGIN)
    size = sum(file["size"] for file in origin["files"])
    stage("DATA", f"{address}: {len(origin['files'])} files, {size / 2**20:,.1f} MiB, kept in {folder}")
    return local


def _split(address: str) -> tuple[str, str]:
    """The place that is listed, and what is wanted below it: a name or a pattern."""
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    first = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    first = max(first, 1)
    return f"{scheme}://{'/'.join(parts[:first])}", "/".join(parts[first:])


def _fetch(address: str, base: str, pattern: str, folder: Path, report: Progress) -> bool:
    """Bring the objects of an address; False when there is none."""
    store = open_store(base)
    wanted = _wanted(store, pattern)
    total, done, facts = sum(entry.size for entry in wanted.values()), 0, []
    for name, entry in sorted(wanted.items()):
        to = folder / FILES / name
        fetch(store, base, name, entry, to, None)
        facts.append({"name": name, "size": entry.size, "etag": entry.etag, "xxh3_128": hash_file(to)})
        done += entry.size
        report(f"fetching {address}", done, total)
    if wanted:
        atomic_write(folder / ORIGIN, json.dumps({"address": address, "files": facts}, indent=1) + "\n")
    return bool(wanted)


def _wanted(store: Store, pattern: str) -> dict[str, Entry]:
    """The objects that a name, a directory's name or a pattern stands for."""
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    listed = store.entries(fixed)
    if not glob.has_magic(pattern):
        below = {
            name: entry for name, entry in listed.items() if not pattern or name.startswith(f"{pattern}/")
        }
        return {pattern: listed[pattern]} if pattern in listed else _known(below)
    match = re.compile(_expression(pattern))
    return _known({name: entry for name, entry in listed.items() if match.match(name)})


def _known(listed: dict[str, Entry]) -> dict[str, Entry]:
    def is_known(name: str) -> bool:
        hidden = any(part.startswith(".") for part in name.split("/"))
        return not hidden and (file_kind(Path(name)) is not None or name.rpartition("/")[2] == SHARD_MANIFEST)

    return {name: entry for name, entry in listed.items() if is_known(name)}


def _expression(pattern: str) -> str:
    """A pattern of paths as a regular expression; what lies below a directory that matches is taken too."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    inside = (
        tokens.get(p) or (p.replace("[!", "[^") if p[:1] == "[" and p[-1:] == "]" else re.escape(p))
        for p in parts
    )
    return "".join(inside) + r"(?:/.*)?\Z"
