"""A tree of files copied to object storage or from it: verified by hash, gone on with after any interruption."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainway.errors import ConfigError, DataError
from trainway.files import disk_faults, fsync_directory, fsync_file, hash_file
from trainway.storage.address import is_safe_name, is_url
from trainway.storage.ledger import LEDGER, Ledger, read_ledger
from trainway.storage.retry import Backoff
from trainway.storage.store import Changed, Content, Entry, Store, open_store, refuse_unsafe

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""
PARTIAL = ".partial-"
GET_ATTEMPTS = 3


@dataclass(frozen=True)
class Copied:
    """What a copy did: files sent and those that were there already, bytes sent."""

    files: int
    unchanged: int
    bytes: int


def copy_tree(
    source: str | Path,
    target: str | Path,
    *,
    progress: Progress | None = None,
    backoff: Backoff | None = None,
) -> Copied:
    """Copy the files below `source` to `target`; one of them is an address, the other a directory.

    Going up, a list of sizes and hashes is written last: without it the copy is not complete, and going down it is
    refused. Files of the same size and hash are left alone. Raises ConfigError, DataError for what is missing or
    altered, EnvironmentFault when the store cannot be reached or the disk is full.
    """
    report = progress or _silent
    from_url, to_url = is_url(str(source)), is_url(str(target))
    if from_url and to_url:
        raise ConfigError(f"{target} is no directory", "both are addresses", "copy to a directory here first")
    if from_url:
        return _download(open_store(source, backoff), str(source), Path(target), report)
    return _upload(Path(source), open_store(target, backoff), str(target), report)


def plain_files(folder: Path, unsafe: set[str] | None = None) -> dict[str, int]:
    """Size of each plain file below a directory, by its relative path; temporary files and links are left out.

    Raises DataError for a name that no copy could have; with `unsafe` it is put there, and left out.
    """
    found: dict[str, int] = {}
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if ".tmp-" not in name)
        for name in sorted(names):
            path = Path(current, name)
            if ".tmp-" in name or PARTIAL in name or path.is_symlink() or not path.is_file():
                continue
            relative = path.relative_to(folder).as_posix()
            if unsafe is not None and not is_safe_name(relative):
                unsafe.add(relative)
                continue
            refuse_unsafe(relative, str(folder))
            try:
                found[relative] = path.stat().st_size
            except FileNotFoundError:
                continue
    return found


def _upload(folder: Path, store: Store, where: str, report: Progress) -> Copied:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing", "there is no such directory", "correct the path")
    files = plain_files(folder)
    files.pop(LEDGER, None)
    ledger = read_ledger(store, where) or Ledger.new()
    listed = store.entries()
    total, done, sent, sent_bytes = sum(files.values()), 0, 0, 0
    for name, size in files.items():
        if not (name in ledger.copies and ledger.holds(name, size, hash_file(folder / name), listed)):
            if ledger.complete:
                ledger.change(complete=False)
                ledger.save(store)
            ledger.put(store, name, Content.of_file(folder / name, size))
            sent, sent_bytes = sent + 1, sent_bytes + size
        done += size
        report("copying", done, total)
    gone = [name for name in ledger.copies if name not in files]
    if gone:
        store.delete(gone)
        ledger.forget(gone)
    store.drop_unfinished("")
    ledger.change(complete=True)
    ledger.save(store)
    return Copied(sent, len(files) - sent, sent_bytes)


def _download(store: Store, where: str, folder: Path, report: Progress) -> Copied:
    ledger = read_ledger(store, where)
    if ledger is not None and not ledger.complete:
        raise DataError(
            f"{where} is not complete",
            "the copy to there has not come to its end",
            "run that copy again first",
        )
    listed = store.entries()
    listed.pop(LEDGER, None)
    if not listed:
        raise DataError(f"{where} holds nothing", "no object's name begins so", "correct the address")
    hashes = {name: copy.xxh3 for name, copy in ledger.copies.items()} if ledger else {}
    if missing := sorted(hashes.keys() - listed.keys()):
        raise DataError(
            f"{where}/{missing[0]} is missing",
            f"of {len(hashes)} files {len(missing)} are",
            "copy it there again",
        )
    names = sorted(hashes or listed)
    total, done, fetched, fetched_bytes = sum(listed[name].size for name in names), 0, 0, 0
    for name in names:
        if fetch(store, where, name, listed[name], folder / name, hashes.get(name)):
            fetched, fetched_bytes = fetched + 1, fetched_bytes + listed[name].size
        done += listed[name].size
        report("copying", done, total)
    return Copied(fetched, len(names) - fetched, fetched_bytes)


def fetch(store: Store, where: str, name: str, entry: Entry, to: Path, xxh3: str | None) -> bool:
    """Make the file `to` from an object, verified against its hash where that is known; False when it was there.

    What an interrupted attempt left is gone on with. Raises DataError when the object is altered or was replaced
    meanwhile.
    """
    refuse_unsafe(name, where)
    with disk_faults(to):
        if xxh3 is not None and to.is_file() and to.stat().st_size == entry.size and hash_file(to) == xxh3:
            return False
        to.parent.mkdir(parents=True, exist_ok=True)
        # of another version of the object it must not be gone on with
        version = xxhash.xxh3_64_hexdigest(f"{entry.size} {entry.etag} {xxh3}".encode())
        partial = to.with_name(f"{to.name}{PARTIAL}{version}")
        for stale in to.parent.glob(f"{glob.escape(to.name)}{PARTIAL}*"):
            if stale != partial:
                stale.unlink()
        found = ""
        for _ in range(GET_ATTEMPTS):
            try:
                store.get(name, entry, partial)
            except Changed:
                partial.unlink(missing_ok=True)
                raise DataError(
                    f"{where}/{name} was replaced while it was read",
                    "",
                    "run the same again when nobody writes there",
                ) from None
            if not entry.size:
                partial.touch()
            found = _problem(store, name, partial, entry, xxh3)
            if not found:
                fsync_file(partial)
                os.replace(partial, to)
                fsync_directory(to.parent)
                return True
            partial.unlink()
    raise DataError(f"{where}/{name}: altered", found, "use another copy, or copy it there again")


def _problem(store: Store, name: str, path: Path, entry: Entry, xxh3: str | None) -> str:
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} of {entry.size} bytes"
    if xxh3 is not None:
        return "" if hash_file(path) == xxh3 else "its content does not match its hash"
    # what Trainway did not put there has only the store's own word
    return (
        "" if store.matches(name, entry, path) is not False else "its content does not match the store's MD5"
    )


def _silent(label: str, done: int, total: int) -> None:
    pass
