"""SHA256SUMS of an exported directory, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainway.files import HASH_BLOCK_BYTES, atomic_write

SUMS = "SHA256SUMS"


def write_sums(directory: Path) -> int:
    """Write the hashes of all files in `directory`, and return their number."""
    paths = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    lines = [f"{sha256(directory / path)}  {path.as_posix()}\n" for path in paths if path.name != SUMS]
    atomic_write(directory / SUMS, "".join(lines))
    return len(lines)


def sha256(path: Path) -> str:
    """Of the file's bytes, as 64 hex digits; reads in blocks, so any size is fine."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
