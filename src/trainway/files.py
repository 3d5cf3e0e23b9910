"""Files that exist only when they are complete: atomic writes, content hashes, JSON, faults of the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from trainway.errors import DataError, EnvironmentFault

HASH_BLOCK_BYTES = 8 << 20

_DISK_FAULTS = {
    errno.ENOSPC: "free some space, or choose a directory on another disk",
    errno.EDQUOT: "free some of your quota, or choose a directory on another disk",
    errno.EROFS: "the file system is read-only: choose another directory, or have it mounted writable",
    errno.EACCES: "choose a directory that you may write to, or change its permissions",
    errno.EPERM: "choose a directory that you may write to, or change its permissions",
    errno.EIO: "the disk reports a failure: check it, and choose a directory on another one",
    errno.EFBIG: "the file system refuses a file of this size: choose another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOLCK: "the file system has no locks: choose a directory on one that has, or mount it with locks",
    errno.ENFILE: "the machine is out of open files: end other programs",
}


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (a str as UTF-8) so that `path` holds either its old content or all of the new one.

    Raises EnvironmentFault when the disk is full, read-only or failing; the temporary file is gone then.
    """
    with atomic_open(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a file open for binary writing that becomes `path` at the end, complete and synced; as `atomic_write`.

    On any exception the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    temp = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_faults(path):
        try:
            with open(temp, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            fsync_directory(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory `NAME.tmp-<id>` beside `path`; at the end fsync it and rename it to `path`.

    On any exception the temporary directory is removed and `path` stays absent. A missing parent is made.
    Raises FileExistsError when `path` exists, EnvironmentFault when the disk is full, read-only or failing.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(errno.EEXIST, "the directory exists already", str(path))
    temp = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with disk_faults(path):
        try:
            temp.mkdir(parents=True)
            yield temp
            fsync_tree(temp)
            os.rename(temp, path)
            fsync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def hash_file(path: str | os.PathLike[str]) -> str:
    """xxh3_128 of the file's bytes as 32 hex digits; reads in blocks, so any size is fine."""
    digest = xxhash.xxh3_128()
    block = bytearray(HASH_BLOCK_BYTES)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(view[:size])
    return digest.hexdigest()


def sealed_json(body: Mapping[str, Any]) -> str:
    """The text of a JSON object with a checksum of itself, so that a change of any byte is seen by `is_sealed`."""
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "checksum": checksum}, indent=1) + "\n"


def is_sealed(text: str, content: Mapping[str, Any]) -> bool:
    """Whether `text`, whose JSON is `content`, is to the byte what `sealed_json` wrote."""
    return text == sealed_json({key: value for key, value in content.items() if key != "checksum"})


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises DataError when the file is missing, unreadable or not JSON."""
    return read_json_text(path)[1]


def read_json_text(path: str | os.PathLike[str]) -> tuple[str, Any]:
    """The text of a JSON file and its value, of one reading; raises as `read_json`."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        return text, json.loads(text)
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing", fix="restore it, or make it anew") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read", f"{error.strerror}", "check its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start}", fix="restore it, or make it anew"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(
            f"{path}: not valid JSON", f"{where}: {error.msg}", "restore it, or make it anew"
        ) from None
    except RecursionError:
        raise DataError(
            f"{path}: not valid JSON", "nested too deeply", "restore it, or make it anew"
        ) from None


@contextmanager
def disk_faults(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the disk (full, quota, read-only, failing) in the block into an EnvironmentFault.

    An error that is not the disk's own, such as a missing file, passes through unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in _DISK_FAULTS:
            raise
        why = f"{os.strerror(number)}{_free_space(path)}"
        raise EnvironmentFault(f"cannot write {path}", why, _DISK_FAULTS[number]) from error


def _system_error(error: Exception) -> int:
    """The system's number of an error; 0 for one that is not its. tokenizers and safetensors, which are written in Rust, say
    it in words alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else 0


def fsync_tree(root: str | os.PathLike[str]) -> None:
    """Flush every file and directory under `root`, the files first, to the disk."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_file(os.path.join(folder, name))
        fsync_directory(folder)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush a file's bytes to the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: str | os.PathLike[str], flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(path: str | os.PathLike[str]) -> str:
    for folder in Path(path).absolute().parents:
        if folder.exists():
            try:
                return f" ({shutil.disk_usage(folder).free / 2**30:.2f} GiB free)"
            except OSError:
                break
    return ""
