"""Text shards: a directory whose `manifest.json` lists each shard with its size and hash, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.errors import DataError
from trainway.files import hash_file, read_json

SHARD_MANIFEST = "manifest.json"

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
    entries = _entries(folder)
    if entries is None:
        return None
    shards: dict[str, Shard] = {}
    for number, entry in enumerate(entries):
        shard = _checked(folder, entry, f"{folder / SHARD_MANIFEST}: shards[{number}]")
        if shard.path.name in shards:
            raise DataError(f"{folder / SHARD_MANIFEST}: {shard.path.name} is listed twice", fix=_CURE)
        shards[shard.path.name] = shard
    for path in files:
        if path.name not in shards and path.name != SHARD_MANIFEST:
            why = f"{folder / SHARD_MANIFEST} does not list it"
            raise DataError(f"{path}: an unknown shard", why, "move it elsewhere, or make the shards again")
    return list(shards.values())


def _entries(folder: Path) -> list[Any] | None:
    path = folder / SHARD_MANIFEST
    try:
        manifest = read_json(path)
    except DataError:
        with path.open("rb") as file:
            first = file.readline(65536).strip()
        if first.startswith(b"{") and first.endswith(b"}"):  # JSON lines that happen to have this name
            return None
        raise
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    return entries if isinstance(entries, list) else None


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
