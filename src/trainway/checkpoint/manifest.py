"""The manifest of a checkpoint: which files it consists of, and how each is told intact from altered."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from trainway.errors import DataError
from trainway.files import fsync_directory, hash_file, is_sealed, sealed_json

MANIFEST = "manifest.json"
FORMAT = 1

_MAX_BYTES = 64 << 20
_HASH = re.compile(r"[0-9a-f]{32}")


def write_manifest(directory: Path, step: int, *, best: bool, info: dict[str, Any]) -> None:
    """Flush every file of `directory` to the disk, then list them with size (bytes) and xxh3_128, flushed too.

    Raises OSError of the disk, and ValueError if the directory holds anything but files and directories.
    """
    entries = dict(_walk(directory))
    if strange := sorted(name for name, status in entries.items() if not stat.S_ISREG(status.st_mode)):
        raise ValueError(f"only plain files belong in a checkpoint, not {', '.join(strange)}")
    names = sorted(entries)
    # 1) the files' bytes 2) the list of them 3) the names, innermost directory first
    hashes = _in_threads(lambda name: _flush_and_hash(directory / name), names)
    files = [
        {"path": name, "size": entries[name].st_size, "xxh3_128": digest}
        for name, digest in zip(names, hashes, strict=True)
    ]
    # info as JSON gives it back (tuples are lists, keys are strings): the checksum is over what will be read
    body = {
        "format": FORMAT,
        "step": step,
        "best": best,
        "info": json.loads(json.dumps(info)),
        "files": files,
    }
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(sealed_json(body))
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(directory, topdown=False):
        fsync_directory(folder)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own checksum.

    Raises DataError when it is missing, unreadable, altered, malformed or names a file outside the checkpoint.
    """
    path = directory / MANIFEST
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _refuse(path, "not a plain file")
        if os.path.getsize(path) > _MAX_BYTES:
            raise _refuse(path, f"larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_bytes().decode("utf-8")
        body = json.loads(text)
    except OSError as error:
        raise _refuse(
            path, "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _refuse(path, "altered: not JSON") from error
    if not isinstance(body, dict):
        raise _refuse(path, "altered: not a JSON object")
    if not is_sealed(text, body):
        raise _refuse(path, "altered: its checksum does not match")
    body.pop("checksum")
    _check_form(path, body)
    return body


def verify_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each: missing, extra, truncated, altered, unreadable."""
    try:
        found = dict(_walk(directory))
    except OSError as error:
        return [f"{directory.name}: unreadable: {error.strerror}"]
    listed = {entry["path"]: entry for entry in manifest["files"]}
    problems = [f"{name}: extra: not in the manifest" for name in sorted(found.keys() - listed.keys())]
    to_hash = []
    for name, entry in listed.items():
        if problem := _problem_of_size(name, entry["size"], found.get(name)):
            problems.append(problem)
        else:
            to_hash.append(name)
    hashes = _in_threads(lambda name: _hash_or_problem(directory / name), to_hash)
    for name, digest in zip(to_hash, hashes, strict=True):
        if digest.startswith("unreadable"):
            problems.append(f"{name}: {digest}")
        elif digest != listed[name]["xxh3_128"]:
            problems.append(f"{name}: altered: its content does not match its hash")
    return problems


def _walk(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Relative path and lstat of all that is not a directory, the manifest left out; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(directory, onerror=fail):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in [*names, *links]:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if relative != MANIFEST:
                yield relative, os.lstat(path)


def _flush_and_hash(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hash_file(path)


def _in_threads(work: Callable[[str], str], names: list[str]) -> list[str]:
    if len(names) <= 1:
        return [work(name) for name in names]
    with ThreadPoolExecutor(min(8, len(names))) as pool:
        return list(pool.map(work, names))


def _check_form(path: Path, body: dict[str, Any]) -> None:
    if body.get("format") != FORMAT:
        raise _refuse(path, f"format {body.get('format')!r}; this version of Trainway reads format {FORMAT}")
    if body.keys() != {"format", "step", "best", "info", "files"} or not isinstance(body["files"], list):
        raise _refuse(path, "malformed: unknown or missing fields")
    if type(body["step"]) is not int or type(body["best"]) is not bool or not isinstance(body["info"], dict):
        raise _refuse(path, "malformed: step, best or info has the wrong type")
    if f"step-{body['step']}" != path.parent.name.partition(".tmp-")[0]:
        raise _refuse(path, f"belongs to step {body['step']}")
    seen = set()
    for entry in body["files"]:
        if not isinstance(entry, dict) or entry.keys() != {"path", "size", "xxh3_128"}:
            raise _refuse(path, "malformed: a file entry with unknown or missing fields")
        name, size, digest = entry["path"], entry["size"], entry["xxh3_128"]
        if not isinstance(name, str) or not _inside(name):
            raise _refuse(path, f"unsafe path {name!r:.80}")
        if name in seen:
            raise _refuse(path, f"malformed: {name!r} is listed twice")
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise _refuse(path, f"malformed: size or hash of {name!r}")
        seen.add(name)


def _inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return (
        name not in ("", ".", MANIFEST)
        and "\0" not in name
        and not pure.is_absolute()
        and ".." not in pure.parts
        and pure.as_posix() == name
    )


def _problem_of_size(name: str, size: int, found: os.stat_result | None) -> str | None:
    if found is None:
        return f"{name}: missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{name}: not a plain file"
    if found.st_size == size:
        return None
    if found.st_size == 0:
        return f"{name}: empty: {size} bytes expected"
    return f"{name}: {'truncated' if found.st_size < size else 'grown'}: {found.st_size} of {size} bytes"


def _hash_or_problem(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _refuse(path: Path, why: str) -> DataError:
    return DataError(f"{path.parent.name}/{path.name}: {why}", fix="use another checkpoint")
