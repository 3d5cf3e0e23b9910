"""Text shards: a directory whose `manifest.json` lists each shard with its size and hash, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.errors import DataError
from trainway.files import hash_file, read_json
from trainway.logs import warn

SHARD_MANIFEST = "manifest.json"
QUARANTINE_FILE = "quarantine.jsonl"
"""Records that the sharder set aside, in the directory of the shards but none of them."""

_CURE = "restore it, or make the shards again"


@dataclass(frozen=True)
class Shard:
    """One verified shard: lines of text, one document each."""

    path: Path
    size: int
    hash: str


def read_shards(folder: Path, files: list[Path]) -> list[Shard] | None:
    """The shards of a directory, in the manifest's order; None when its `manifest.json` is plain data.

    files: the data files found in the directory; one that the manifest does not list is an error.
    Raises DataError naming the shard that is missing, empty, altered, listed twice or unknown.
    """
    manifest = _manifest(folder)
    shards = None if manifest is None else check_shards(folder, files, manifest)
    if shards and manifest and manifest.get("complete") is False:
        warn(f"{folder}: the sharder has not finished; the {len(shards)} shards it completed are used")
    return shards


def check_shards(folder: Path, files: list[Path], manifest: dict[str, Any] | None = None) -> list[Shard]:
    """The shards that the directory's manifest lists, each checked; raises as `read_shards` does."""
    manifest = _manifest(folder) if manifest is None else manifest
    entries = manifest["shards"] if manifest else []
    shards: dict[str, Shard] = {}
    for number, entry in enumerate(entries):
        shard = _checked(folder, entry, f"{folder / SHARD_MANIFEST}: shards[{number}]")
        if shard.path.name in shards:
            raise DataError(f"{folder / SHARD_MANIFEST}: {shard.path.name} is listed twice", fix=_CURE)
        shards[shard.path.name] = shard
    known = {SHARD_MANIFEST, QUARANTINE_FILE} if manifest and manifest.get("quarantine") else {SHARD_MANIFEST}
    # a sharder that works here, or was killed, has its next shard under its final name for an instant
    coming = f"shard-{len(entries):05d}." if manifest and manifest.get("complete") is False else None
    for path in files:
        if path.name in shards or path.name in known or (coming and path.name.startswith(coming)):
            continue
        why = f"{folder / SHARD_MANIFEST} does not list it"
        raise DataError(f"{path}: an unknown shard", why, "move it elsewhere, or make the shards again")
    return list(shards.values())


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / SHARD_MANIFEST
    try:
        manifest = read_json(path)
    except DataError:
        with path.open("rb") as file:
            first = file.readline(65536).strip()
        if first.startswith(b"{") and first.endswith(b"}"):  # JSON lines that happen to have this name
            return None
        raise
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("shards"), list) else None


def _checked(folder: Path, entry: Any, where: str) -> Shard:
    fields = entry if isinstance(entry, dict) else {}
    name, size, digest = fields.get("file"), fields.get("bytes"), fields.get("hash")
    if not (isinstance(name, str) and isinstance(size, int) and isinstance(digest, str)):
        raise DataError(f"{where}: needs 'file', 'bytes' and 'hash'", fix=_CURE)
    path = folder / name
    # The manifest is data from elsewhere: it must not lead out of its own directory.
    if Path(name).name != name or name in {"", ".", ".."} or "\0" in name or path.is_symlink():
        raise DataError(f"{where}: {name!r} is not a plain file name", fix=_CURE)
    if not path.is_file():
        raise DataError(f"{path}: the shard is missing", f"{where} lists it", _CURE)
    found = path.stat().st_size
    if found != size or found == 0:
        why = "it is empty" if found == 0 else f"{found} bytes; the manifest says {size}"
        raise DataError(f"{path}: the shard was altered", why, _CURE)
    if (found_hash := hash_file(path)) != digest:
        why = f"its xxh3 hash is {found_hash}; the manifest says {digest}"
        raise DataError(f"{path}: the shard was altered", why, _CURE)
    return Shard(path, size, digest)
