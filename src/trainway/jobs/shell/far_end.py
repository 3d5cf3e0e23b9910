"""What works at the other end of a connection: files in and out, and a file that is followed.

It is sent there as text and run by the machine's own Python (3.8 or newer, standard library alone), so nothing needs to
be installed first; the same functions receive files here. Values come as JSON through stdin: no shell ever reads them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

HELLO = b"trainway far end 1\n"
"""Before the answers: what a login script prints comes above it."""
PART = ".trainway-part"
"""Ends the name of a file that is not complete yet."""
BLOCK = 1 << 20
POLL_S = 0.3
HEARTBEAT_S = 15.0
"""A line on which nothing is sent for longer may be cut unnoticed."""


class Refused(Exception):
    """A path that leads out of its directory, or a thing that is no file."""


def serve() -> int:
    """Do what each line of stdin asks for, until it ends; answers and faults are JSON, a line each."""
    ask, answer = sys.stdin.buffer, sys.stdout.buffer
    answer.write(HELLO)
    answer.flush()
    try:
        while True:
            line = ask.readline()
            if not line.endswith(b"\n"):
                return 0
            told = json.loads(line)
            VERBS[told.pop("verb")](told, ask, answer)
    except (BrokenPipeError, EOFError):
        return 1  # the line is cut
    except Refused as error:
        tell(answer, {"fault": str(error)})
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(answer, {"fault": where + (error.strerror or str(error))})
    return 0  # after a fault nobody knows what the next byte is


def tell(answer: BinaryIO, value: Any) -> None:
    answer.write(json.dumps(value).encode() + b"\n")
    answer.flush()


def full(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def kind_of(path: str) -> str | None:
    """`directory`, `file` or None, links followed."""
    path = full(path)
    return "directory" if os.path.isdir(path) else "file" if os.path.isfile(path) else None


def read_text(path: str) -> str | None:
    """All of a small file; None where there is none."""
    try:
        with open(full(path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return None


def list_tree(root: str, name: str | None = None) -> list[dict[str, Any]]:
    """What is under the directory `root`, or its one entry `name` with all below it, in the order of the names.

    Entries are {path, size, mode}, {path, link} or {path, dir: True}. Links are kept as links where they lead to
    something within the tree. Raises Refused for one that does not, and for what is neither file nor directory.
    """
    root = os.path.realpath(full(root))
    top = os.path.join(root, name) if name else root
    return [entry for entry in _entries(root, top) if not entry["path"].endswith(PART)]


def _entries(root: str, top: str) -> Iterator[dict[str, Any]]:
    found = os.lstat(top)
    path = os.path.relpath(top, root)
    if stat.S_ISLNK(found.st_mode):
        yield {"path": path, "link": checked_link(path, os.readlink(top))}
    elif stat.S_ISREG(found.st_mode):
        yield {"path": path, "size": found.st_size, "mode": sane_mode(found.st_mode)}
    elif stat.S_ISDIR(found.st_mode):
        if top != root:
            yield {"path": path, "dir": True}
        for name in sorted(os.listdir(top)):
            yield from _entries(root, os.path.join(top, name))
    else:
        raise Refused(f"{top}: neither a file nor a directory nor a link")


def sane_mode(mode: int) -> int:
    """Executable or not, private or not; never writable by others, never setuid."""
    plain = 0o755 if mode & 0o100 else 0o644
    return plain & 0o700 if not mode & 0o077 else plain


def checked_link(path: str, target: str) -> str:
    """The target of the link `path`. Raises Refused when it leads out of the directory."""
    place = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if os.path.isabs(target) or place == ".." or place.startswith("../") or not target:
        raise Refused(f"{path}: a link that leads out of the directory, to {target}")
    return target


def inside(root: str, path: str) -> str:
    """Where `path` is under `root`. Raises Refused unless every step of the way is a plain name and no link."""
    names = path.split("/")
    if "\0" in path or any(name in ("", ".", "..") for name in names):
        raise Refused(f"{path!r}: a path that leads out of the directory")
    folder = full(root)
    for name in names[:-1]:
        folder = os.path.join(folder, name)
        if os.path.islink(folder):
            raise Refused(f"{folder}: a link stands where a directory is expected")
    return os.path.join(folder, names[-1])


def size_of(root: str, path: str) -> int:
    """Bytes of a plain file, or -1."""
    with suppress(OSError):
        found = os.lstat(inside(root, path))
        return found.st_size if stat.S_ISREG(found.st_mode) else -1
    return -1


def digest(root: str, path: str, size: int) -> str:
    """sha256 of the first `size` bytes of a file; empty when it is shorter, or gone."""
    try:
        with open(inside(root, path), "rb") as file:
            return _read(file, size, lambda block: None)
    except (OSError, EOFError):
        return ""


def _read(file: BinaryIO, size: int, take: Callable[[bytes], object]) -> str:
    """Hand `size` bytes of `file` to `take`; their sha256. Raises EOFError when it is shorter."""
    seen = hashlib.sha256()
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            raise EOFError
        seen.update(block)
        take(block)
        size -= len(block)
    return seen.hexdigest()


def send(root: str, files: list[list[Any]], out: BinaryIO) -> None:
    """Write frames for `files`, pairs of an entry and the bytes of it that the receiver has already.

    A frame is the entry with its offset as a line of JSON, the bytes from there on, and the sha256 of the whole file.
    """
    for entry, offset in files:
        tell(out, dict(entry, offset=offset))
        if "size" in entry:
            send_file(inside(root, entry["path"]), entry["size"], offset, out)
    tell(out, {"end": True})


def send_file(
    path: str, size: int, offset: int, out: BinaryIO, moved: Callable[[int], None] | None = None
) -> None:
    """The bytes of a file from `offset` on, and the sha256 of all of it. Raises Refused when it became shorter."""
    left = offset

    def take(block: bytes) -> None:
        nonlocal left
        new = block[left:] if left else block
        left -= len(block) - len(new)
        out.write(new)
        if moved is not None:
            moved(len(new))

    with open(path, "rb") as file:
        try:
            seen = _read(file, size, take)
        except EOFError:
            raise Refused(f"{path}: it became shorter while it was sent") from None
    out.write(seen.encode() + b"\n")


def receive(
    root: str,
    source: BinaryIO,
    done: Callable[[dict[str, Any]], object],
    names: dict[str, str] | None = None,
    moved: Callable[[int], None] | None = None,
) -> None:
    """Take the frames of `send` and make what they hold under `root`; {path, ok} to `done` for each.

    names: paths under which to keep them instead, for those that were asked for; moved: told of bytes as they come.

    A file has its name only when it is complete, synced and its hash is right; until then its bytes stay in a part
    file, from where the next attempt goes on. Raises Refused for a path or link that leads out, EOFError when cut.
    """
    os.makedirs(full(root), exist_ok=True)
    while True:
        line = source.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        frame = json.loads(line)
        if "fault" in frame:
            raise Refused(frame["fault"])
        if "end" in frame:
            done(frame)
            return
        if names is not None and frame["path"] not in names:
            raise Refused(f"{frame['path']!r}: nobody asked for it")
        path = inside(root, names[frame["path"]] if names is not None else frame["path"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        ok = True
        if "link" in frame:
            _make_link(path, checked_link(frame["path"], frame["link"]))
        elif "dir" in frame:
            os.makedirs(path, exist_ok=True)
        else:
            ok = _receive_file(path, frame, source, moved)
        done({"path": frame["path"], "ok": ok})


def _make_link(path: str, target: str) -> None:
    if os.path.islink(path) and os.readlink(path) == target:
        return
    part = path + PART
    with suppress(FileNotFoundError):
        os.unlink(part)
    os.symlink(target, part)
    os.replace(part, path)


def _receive_file(
    path: str, frame: dict[str, Any], source: BinaryIO, moved: Callable[[int], None] | None
) -> bool:
    part = path + PART
    mode = sane_mode(int(frame["mode"]))
    # no O_APPEND: an older attempt that still hangs on its line would write the same bytes at the same place
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with _named(part), open(descriptor, "r+b") as file:
        seen = hashlib.sha256()
        for _ in _blocks(file, frame["offset"], seen):
            pass
        file.truncate(frame["offset"])
        file.seek(frame["offset"])
        for block in _blocks(source, frame["size"] - frame["offset"], seen):
            file.write(block)
            if moved is not None:
                moved(len(block))
        wanted = source.readline()
        if not wanted.endswith(b"\n"):
            raise EOFError
        if wanted.strip().decode() != seen.hexdigest():
            os.unlink(part)
            return False
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.replace(part, path)
    return True


@contextmanager
def _named(path: str) -> Iterator[None]:
    """A fault of the disk, such as a full one, says of which file it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):
            error.filename = path
        raise


def _blocks(file: BinaryIO, size: int, seen: Any) -> Iterator[bytes]:
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            raise EOFError
        seen.update(block)
        size -= len(block)
        yield block


def follow(told: dict[str, Any], ask: BinaryIO, answer: BinaryIO) -> None:
    """Send the bytes of a growing file: a line {offset, bytes}, then the bytes; at last {end: why}.

    told: `log`; `offset` to begin at, or `tail` lines from its end; `follow`; `state` and `lock`, the job's files: the
    end is reached when the state says so, or nobody holds the lock any more. It ends with the line, too.
    """
    offset = told["offset"]
    if told.get("tail") is not None:
        offset = tail_offset(told["log"], told["tail"])
    silent = 0.0
    while True:
        why = "" if told["follow"] else "asked"
        why = why or job_ended(told["state"], told["lock"])  # before the last look at the log
        sent = 0
        for block in _news(told["log"], offset):
            tell(answer, {"offset": offset, "bytes": len(block)})
            answer.write(block)
            answer.flush()
            offset += len(block)
            sent += len(block)
        if why:
            tell(answer, {"offset": offset, "end": why})
            return
        silent = 0.0 if sent else silent + POLL_S
        if silent >= HEARTBEAT_S:
            silent = 0.0
            tell(answer, {"offset": offset, "bytes": 0})
        if select.select([ask], [], [], POLL_S)[0] and not ask.read(1):
            return  # whoever asked has gone


def _news(path: str, offset: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while True:
                block = file.read(BLOCK)
                if not block:
                    return
                yield block
    except FileNotFoundError:
        return


def tail_offset(path: str, lines: int) -> int:
    """Where the last `lines` lines of a file begin; 0 when it has fewer, or is not there."""
    try:
        with open(path, "rb") as file:
            place = file.seek(0, os.SEEK_END)
            wanted = lines + 1
            last = True
            while place > 0:
                start = max(0, place - BLOCK)
                file.seek(start)
                block = file.read(place - start)
                if last and not block.endswith(b"\n"):
                    wanted = max(1, wanted - 1)  # the last line has no end yet
                last = False
                at = len(block)
                while wanted > 0 and at >= 0:
                    at = block.rfind(b"\n", 0, at)
                    if at < 0:
                        break
                    wanted -= 1
                if wanted <= 0:
                    return start + at + 1
                place = start
    except FileNotFoundError:
        pass
    return 0


def job_ended(state: str, lock: str) -> str:
    """Why no more will be said: `ended`, or `gone` when the supervisor died without a word; else empty."""
    stage = ""
    with suppress(OSError, ValueError), open(state, "rb") as file:
        stage = json.load(file).get("stage", "")
    if stage == "ended":
        return "ended"
    return "gone" if stage and not is_held(lock) else ""


def is_held(lock: str) -> bool:
    """Whether a process holds the lock file."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # shared: two that look at once do not take each other for the holder
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True
        raise
    finally:
        os.close(descriptor)


VERBS: dict[str, Callable[[dict[str, Any], BinaryIO, BinaryIO], object]] = {
    "kind": lambda told, ask, answer: tell(answer, kind_of(told["path"])),
    "read": lambda told, ask, answer: tell(answer, read_text(told["path"])),
    "list": lambda told, ask, answer: tell(answer, list_tree(told["root"], told["name"])),
    "sizes": lambda told, ask, answer: tell(answer, [size_of(told["root"], path) for path in told["paths"]]),
    "digests": lambda told, ask, answer: tell(
        answer, [digest(told["root"], path, size) for path, size in told["pairs"]]
    ),
    "receive": lambda told, ask, answer: receive(told["root"], ask, lambda done: tell(answer, done)),
    "send": lambda told, ask, answer: send(told["root"], told["files"], answer),
    "follow": follow,
}
"""What can be asked for."""
