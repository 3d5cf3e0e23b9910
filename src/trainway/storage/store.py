"""One interface to where copies are kept: a bucket or a directory; what is put there is verified before it counts."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import xxhash

from trainway.errors import DataError, EnvironmentFault
from trainway.files import atomic_open, disk_faults, hash_file
from trainway.storage.address import Address, is_safe_name, is_url, parse_address
from trainway.storage.retry import Backoff, Passing, persist

BLOCK_BYTES = 16 << 20
"""Of one part of an object: a few of them are in memory at a time, and nothing larger ever is."""


@dataclass(frozen=True)
class Entry:
    """An object as the store lists it. `etag` changes with the content; empty where a store has none."""

    size: int
    etag: str = ""


class Changed(Exception):
    """The object is no longer the one that was listed."""


class Content:
    """Exactly `size` bytes that can be read from the start again and again, hashed on the way (xxh3_128)."""

    def __init__(self, size: int, opened: Callable[[], BinaryIO]) -> None:
        self.size = size
        self._opened = opened
        self.xxh3 = ""
        """Of the bytes that the last complete reading gave."""

    @classmethod
    def of_file(cls, path: Path, size: int | None = None) -> Content:
        """The first `size` bytes of a file, or all that it has now. Raises OSError."""
        return cls(path.stat().st_size if size is None else size, lambda: open(path, "rb", buffering=0))

    @classmethod
    def of_bytes(cls, data: bytes) -> Content:
        return cls(len(data), lambda: io.BytesIO(data))

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The bytes in order; no block for no bytes. Raises DataError for a file that has fewer now, OSError."""
        digest = xxhash.xxh3_128()
        left = self.size
        with self._opened() as file:
            while left:
                block = _read_fully(file, min(block_bytes, left))
                if not block:
                    raise DataError(
                        "a file became shorter while it was copied",
                        f"{left} bytes of {self.size} are missing",
                    )
                digest.update(block)
                left -= len(block)
                yield block
        self.xxh3 = digest.hexdigest()


class Store(Protocol):
    """Objects below one address, by their names relative to it. Every method raises UserError."""

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """Every object whose name begins with `prefix`."""

    def put(self, name: str, content: Content) -> Entry:
        """Make the object: all of it or none, verified. Raises OSError of the local file."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A small object; None when there is none. Raises DataError when it has more than `limit` bytes."""

    def get(self, name: str, entry: Entry, to: Path) -> None:
        """Complete the file `to`, which may hold the object's beginning already. Raises Changed, and OSError
        of the local file."""

    def matches(self, name: str, entry: Entry, path: Path) -> bool | None:
        """Whether a file has the hash that the store tells of an object; None where it tells none."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""

    def drop_unfinished(self, prefix: str) -> None:
        """Remove what interrupted uploads below `prefix` have left where no listing shows it."""


def open_store(place: str | Path, backoff: Backoff | None = None) -> Store:
    """The store at an address or in a directory. Raises ConfigError, and EnvironmentFault for a missing library."""
    backoff = backoff or Backoff()
    if isinstance(place, Path) or not is_url(place):
        return DirectoryStore(Path(place).expanduser())
    if place.startswith("file://"):
        return DirectoryStore(Path(place.removeprefix("file://")))
    address = parse_address(place)
    if address.scheme == "s3":
        from trainway.storage.s3 import S3Store

        return S3Store(address, backoff)
    from trainway.storage.gcs import open_gcs

    return FsspecStore(address, open_gcs(), backoff)


class DirectoryStore:
    """A directory: of another disk, or of a volume that several machines mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        found = {}
        for current, folders, names in os.walk(self.folder):
            folders.sort()
            for name in names:
                path = Path(current, name)
                relative = path.relative_to(self.folder).as_posix()
                if relative.startswith(prefix) and not path.is_symlink() and ".tmp-" not in relative:
                    with suppress(FileNotFoundError):
                        found[relative] = _file_entry(path)
        return found

    def put(self, name: str, content: Content) -> Entry:
        path = self.folder / name
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path) as file:
            for block in content.blocks():
                file.write(block)
        return _file_entry(path)

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            with open(self.folder / name, "rb") as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        refuse_larger(len(data), limit, f"{self.folder / name}")
        return data

    def get(self, name: str, entry: Entry, to: Path) -> None:
        try:
            with open(self.folder / name, "rb") as source, open(to, "wb") as file:
                shutil.copyfileobj(source, file, BLOCK_BYTES)
        except FileNotFoundError as error:
            raise Changed from error
        if to.stat().st_size != entry.size:
            raise Changed

    def matches(self, name: str, entry: Entry, path: Path) -> bool | None:
        return hash_file(self.folder / name) == hash_file(path)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.folder / name
            with disk_faults(path):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # the last one takes its directory along
                for parent in path.relative_to(self.folder).parents[:-1]:
                    (self.folder / parent).rmdir()

    def drop_unfinished(self, prefix: str) -> None:
        for path in list(self.folder.rglob("*.tmp-*")):
            if path.relative_to(self.folder).as_posix().startswith(prefix):
                path.unlink(missing_ok=True)


class FsspecStore:
    """A bucket through any file system of fsspec that makes an object visible only when it is closed, as gcsfs does.

    Verified by size, and by MD5 where the file system tells it (gcsfs: md5Hash).
    """

    def __init__(self, address: Address, files: Any, backoff: Backoff) -> None:
        self._address, self._files, self._backoff = address, files, backoff
        self._base = address.bucket + (f"/{address.prefix}" if address.prefix else "")

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        found = self._do("listing", "", lambda: self._files.find(self._base, detail=True))
        names = {path.strip("/").removeprefix(f"{self._base}/"): facts for path, facts in found.items()}
        return {name: _entry(facts) for name, facts in names.items() if name.startswith(prefix)}

    def put(self, name: str, content: Content) -> Entry:
        def write() -> Entry:
            md5 = hashlib.md5(usedforsecurity=False)
            with self._files.open(f"{self._base}/{name}", "wb", block_size=BLOCK_BYTES) as file:
                for block in content.blocks():
                    md5.update(block)
                    file.write(block)
            facts = self._info(name)
            told = facts.get("md5Hash")
            if facts["size"] != content.size or (told is not None and told != _base64(md5.digest())):
                raise Passing("the store holds other bytes than it was sent")
            return _entry(facts)

        return self._do("writing", name, write)

    def read(self, name: str, limit: int) -> bytes | None:
        path = f"{self._base}/{name}"
        try:
            data: bytes = self._do(
                "reading", name, lambda: self._files.cat_file(path, start=0, end=limit + 1)
            )
        except FileNotFoundError:
            return None
        refuse_larger(len(data), limit, f"{self._address}/{name}")
        return data

    def get(self, name: str, entry: Entry, to: Path) -> None:
        with open(to, "ab") as file:
            while (start := file.tell()) < entry.size:
                end = min(start + BLOCK_BYTES, entry.size)
                file.write(self._do("reading", name, partial(self._block, name, entry, start, end)))

    def matches(self, name: str, entry: Entry, path: Path) -> bool | None:
        told = self._do("looking at", name, lambda: self._info(name)).get("md5Hash")
        return None if told is None else told == _base64(file_md5(path)[0])

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._do("removing", name, partial(self._files.rm_file, f"{self._base}/{name}"))

    def drop_unfinished(self, prefix: str) -> None:
        """Nothing: an unfinished upload to Google's storage ends by itself and costs nothing."""

    def _block(self, name: str, entry: Entry, start: int, end: int) -> bytes:
        if _entry(self._info(name)) != entry:
            raise Changed
        data: bytes = self._files.cat_file(f"{self._base}/{name}", start=start, end=end)
        if len(data) != end - start:
            raise Passing(f"a short read: {len(data)} of {end - start} bytes")
        return data

    def _info(self, name: str) -> dict[str, Any]:
        self._files.invalidate_cache()
        facts: dict[str, Any] = self._files.info(f"{self._base}/{name}")
        return facts

    def _do(self, doing: str, name: str, work: Callable[[], Any]) -> Any:
        def tried() -> Any:
            self._files.invalidate_cache()
            try:
                return work()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise EnvironmentFault(
                    f"{self._address}: the store refuses {doing}",
                    "",
                    "see that the machine's login may list, read, write and remove there",
                ) from error
            except OSError as error:
                raise Passing(type(error).__name__) from error

        return persist(tried, f"{doing} {self._address}/{name}", self._backoff)


def refuse_larger(size: int, limit: int, what: str) -> None:
    """Raise DataError for an object that is larger than Trainway writes its kind."""
    if size > limit:
        raise DataError(f"{what}: larger than {limit >> 20} MiB", "Trainway writes no such file", "remove it")


def refuse_unsafe(name: str, where: str) -> None:
    """Raise DataError for an object's name that is no plain path."""
    if not is_safe_name(name):
        raise DataError(f"{where}: unsafe name {name!r:.80}", "it is no plain path", "remove or rename it")


def file_md5(path: Path, part_bytes: int | None = None) -> tuple[bytes, int]:
    """MD5 of a file, or of its parts' MD5s, and the number of parts."""
    whole = hashlib.md5(usedforsecurity=False)
    count = 0
    for block in Content.of_file(path).blocks(part_bytes or BLOCK_BYTES):
        whole.update(hashlib.md5(block, usedforsecurity=False).digest() if part_bytes else block)
        count += 1
    return whole.digest(), count


def _file_entry(path: Path) -> Entry:
    # a file is replaced as a whole here, so each version has an inode and a time of its own
    status = path.stat()
    return Entry(status.st_size, f"{status.st_ino:x}-{status.st_mtime_ns:x}")


def _entry(facts: dict[str, Any]) -> Entry:
    return Entry(int(facts["size"]), str(facts.get("etag") or facts.get("ETag") or "").strip('"'))


def _read_fully(file: BinaryIO, size: int) -> bytes:
    # an unbuffered read may give less than there is
    block = file.read(size)
    while block and len(block) < size:
        more = file.read(size - len(block))
        if not more:
            break
        block += more
    return block


def _base64(digest: bytes) -> str:
    import base64

    return base64.b64encode(digest).decode()
