"""Files to and from another machine: what is there is not sent again, what was cut goes on, every byte is verified."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainway.errors import ConfigError, DataError
from trainway.files import disk_faults
from trainway.jobs.shell import far_end
from trainway.jobs.shell.command import ConnectionLost
from trainway.jobs.shell.connection import RETRY_S, Connection, FarEnd
from trainway.jobs.shell.far_end import PART
from trainway.jobs.target import Say

Entry = dict[str, Any]
Pair = tuple[str, int]
"""A path, and how many of its bytes."""
Digests = Callable[[Sequence[Pair]], list[str]]
Moved = Callable[[int], None]
"""Told how many bytes have just gone over the line."""
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class _Transfer:
    """What goes over the line, in whichever direction."""

    here: Path
    """Directory on this machine."""
    root: str
    """Directory there."""
    names: dict[str, str]
    """Each entry's path at the receiver by its path at the sender."""
    missing: list[tuple[Entry, int]]
    """What the receiver lacks, each with the bytes of it that it has."""


def upload(connection: Connection, source: Path, to: str, say: Say) -> None:
    """Bring the file or directory `source` there, to the path `to`; see `Connection.upload`."""
    source = source.expanduser().resolve()
    if not source.exists():
        raise DataError(f"{source}: there is no such file or directory", "", "correct the path")
    folder = source if source.is_dir() else source.parent
    upload_entries(connection, folder, _listed(source), to, say, single=not source.is_dir())


def upload_entries(
    connection: Connection, folder: Path, entries: Sequence[Entry], to: str, say: Say, *, single: bool = False
) -> None:
    """Bring some entries of the directory `folder` (as `far_end.list_tree` gives them) into the directory `to`.

    single: there is one file, and `to` is its path.
    """
    root, _, name = to.rstrip("/").rpartition("/") if single else (to, "", "")
    names = {entry["path"]: name or entry["path"] for entry in entries}
    root = root or "/"

    def plan(far: FarEnd) -> _Transfer:
        there = list(names.values())
        parts = [path + PART for path in there]
        sizes = far.ask("sizes", root=root, paths=there + parts)
        missing = _still_to_send(
            entries,
            dict(zip(names, sizes[: len(there)], strict=True)),
            dict(zip(names, sizes[len(there) :], strict=True)),
            lambda pairs: far.ask(
                "digests", root=root, pairs=[(_renamed(path, names), size) for path, size in pairs]
            ),
            lambda pairs: [
                far_end.digest(str(folder), path.removesuffix(PART), size) for path, size in pairs
            ],
        )
        return _Transfer(folder, root, names, missing)

    _until_done(connection, plan, _push, _Progress(say, f"to {connection.address}"))


def download(connection: Connection, source: str, to: Path, say: Say) -> None:
    """Bring the file or directory `source` from there to the path `to`; see `Connection.download`."""
    to = to.expanduser().absolute()

    def plan(far: FarEnd) -> _Transfer:
        kind = far.ask("kind", path=source)
        single = kind == "file"
        if kind is None:
            raise DataError(f"{far.where}: there is no {source}", "", "see what is there: `trainway ssh`")
        above, _, name = source.rstrip("/").rpartition("/") if single else (source, "", "")
        root, here = above or ("/" if source.startswith("/") else "."), to.parent if single else to
        entries: list[Entry] = far.ask("list", root=root, name=name or None)
        names = {entry["path"]: to.name if single else entry["path"] for entry in entries}
        missing = _still_to_send(
            entries,
            {path: far_end.size_of(str(here), names[path]) for path in names},
            {path: far_end.size_of(str(here), names[path] + PART) for path in names},
            lambda pairs: [far_end.digest(str(here), _renamed(path, names), size) for path, size in pairs],
            lambda pairs: far.ask(
                "digests", root=root, pairs=[(path.removesuffix(PART), size) for path, size in pairs]
            ),
        )
        return _Transfer(here, root, names, missing)

    _until_done(connection, plan, _pull, _Progress(say, f"from {connection.address}"))


def _listed(source: Path) -> list[Entry]:
    root, name = (source, None) if source.is_dir() else (source.parent, source.name)
    try:
        return far_end.list_tree(str(root), name)
    except far_end.Refused as error:
        raise ConfigError(
            f"{source} cannot be uploaded", str(error), "take it out, or put a copy of the file in its place"
        ) from None


def _still_to_send(
    entries: Iterable[Entry],
    whole: dict[str, int],
    part: dict[str, int],
    receiver: Digests,
    sender: Digests,
) -> list[tuple[Entry, int]]:
    """What the receiver lacks, each with the bytes of it that it has; by hashes of both sides, never by dates.

    whole, part: bytes that the receiver has under the name and under the name of the part; -1 for none.
    """
    begun: dict[str, Pair] = {}
    for entry in entries:
        path, size = entry["path"], entry.get("size", -1)
        if size >= 0 and whole[path] == size:
            begun[path] = (path, size)
        elif 0 < part[path] <= size:
            begun[path] = (path + PART, part[path])
    pairs = list(begun.values())
    same = {
        pair for pair, there, here in zip(pairs, receiver(pairs), sender(pairs), strict=True) if there == here != ""
    } if pairs else set()  # fmt: skip
    missing = []
    for entry in entries:
        pair = begun.get(entry["path"])
        if pair is None or pair not in same:
            missing.append((entry, 0))
        elif pair[0] != entry["path"]:
            missing.append((entry, pair[1]))
    return missing


def _renamed(path: str, names: dict[str, str]) -> str:
    return names[path.removesuffix(PART)] + PART if path.endswith(PART) else names[path]


def _push(far: FarEnd, what: _Transfer, moved: Moved) -> list[str]:
    """Send it; the paths that arrived with a wrong hash."""
    far.begin("receive", root=what.root)
    answers = _Answers(far.answers)
    try:
        _send_renamed(what, far.to, moved)
        far.to.flush()
    except far_end.Refused as error:
        raise DataError(str(error), "", "upload files that nothing writes to") from None
    except BrokenPipeError:
        answers.wait()
        far.checked(answers.fault)  # a full disk ends it too
        raise
    answers.wait()
    far.checked(answers.fault)
    if not answers.complete:
        raise BrokenPipeError
    return answers.bad


def _send_renamed(what: _Transfer, ask: BinaryIO, moved: Moved) -> None:
    for entry, offset in what.missing:
        frame = {**entry, "path": what.names[entry["path"]], "offset": offset}
        ask.write(json.dumps(frame).encode() + b"\n")
        if "size" in entry:
            path = far_end.inside(str(what.here), entry["path"])
            far_end.send_file(path, entry["size"], offset, ask, moved)
    ask.write(json.dumps({"end": True}).encode() + b"\n")


class _Answers:
    """Read beside the sending, so that neither end waits for the other with a full pipe."""

    def __init__(self, answer: BinaryIO) -> None:
        self.bad: list[str] = []
        self.fault: Entry | None = None
        self.complete = False
        self._answer = answer
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _read(self) -> None:
        with suppress(OSError, ValueError):  # the line is cut: the sender notices
            for line in self._answer:
                found = json.loads(line)
                if "fault" in found:
                    self.fault = found
                elif "end" in found:
                    self.complete = True
                    return
                elif not found["ok"]:
                    self.bad.append(found["path"])


def _pull(far: FarEnd, what: _Transfer, moved: Moved) -> list[str]:
    """Receive it; as `_push`."""
    bad: list[str] = []

    def done(frame: Entry) -> None:
        if not frame.get("ok", True):
            bad.append(frame["path"])

    far.begin("send", root=what.root, files=what.missing)
    with disk_faults(what.here):
        try:
            far_end.receive(str(what.here), far.answers, done, names=what.names, moved=moved)
        except EOFError:
            raise BrokenPipeError from None
        except far_end.Refused as error:
            raise DataError(
                f"{far.where}: {what.root} cannot be downloaded", str(error), "nothing was written outside"
            ) from None
    return bad


class _Damaged(DataError):
    """Arrived with a wrong hash; sent once more."""


def _until_done(
    connection: Connection,
    plan: Callable[[FarEnd], _Transfer],
    move: Callable[[FarEnd, _Transfer, Moved], list[str]],
    progress: _Progress,
) -> None:
    failures = 0
    while True:
        moved = progress.total_moved
        try:
            _attempt(connection, plan, move, progress)
        except (ConnectionLost, _Damaged) as error:
            damaged = isinstance(error, _Damaged)
            failures = 1 if progress.total_moved > moved and not damaged else failures + 1
            if failures > (2 if damaged else len(RETRY_S)):
                raise
            progress.say(f"{error.what}; going on in {RETRY_S[failures - 1]:g} s")
            time.sleep(RETRY_S[failures - 1])
        else:
            progress.end()
            return


def _attempt(
    connection: Connection,
    plan: Callable[[FarEnd], _Transfer],
    move: Callable[[FarEnd, _Transfer, Moved], list[str]],
    progress: _Progress,
) -> None:
    """See what is missing, move it, and see that it has arrived as it was. Raises ConnectionLost, _Damaged."""
    with connection.far_end() as far:
        what = plan(far)
        progress.begin(what.missing)
        bad = move(far, what, progress.moved) if what.missing else []
    if bad:
        raise _Damaged(
            f"{bad[0]}: its hash is wrong after the transfer",
            "the file changed meanwhile, or a disk or the network is faulty",
            "try again; check the disks if it happens again",
        )


@dataclass
class _Progress:
    """What has gone over the line, said now and then."""

    say: Say
    where: str
    total_moved: int = 0
    """Bytes, over all attempts."""
    _left: int = 0
    _files: int = 0
    _began: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def begin(self, missing: Sequence[tuple[Entry, int]]) -> None:
        self._left = sum(entry.get("size", 0) - offset for entry, offset in missing)
        self._files = max(self._files, len(missing))
        if any(offset for _, offset in missing):
            kept = sum(offset for _, offset in missing)
            self.say(f"goes on after {_bytes(kept)} that are there")
        if missing:
            self.say(f"{len(missing)} files, {_bytes(self._left)} {self.where}")

    def moved(self, size: int) -> None:
        self.total_moved += size
        self._left -= size
        now = time.monotonic()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            speed = self.total_moved / (now - self._began)
            self.say(f"{_bytes(self._left)} left {self.where}, {_bytes(speed)}/s")

    def end(self) -> None:
        if self._files == 0:
            self.say("all files are there already")
        else:
            self.say(f"{_bytes(self.total_moved)} {self.where}, verified")


def _bytes(size: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
