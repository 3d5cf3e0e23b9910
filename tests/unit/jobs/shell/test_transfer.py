"""Files to and from another machine over a real sshd: cut, damaged, linked, named to do harm."""

from __future__ import annotations

import io
import json
import os
import shlex
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.sshd import Server, needs_sshd, new_server, plain_environment
from trainway.errors import ConfigError, DataError, EnvironmentFault, ExitCode
from trainway.jobs.shell import far_end, transfer
from trainway.jobs.shell.command import ConnectionLost
from trainway.jobs.shell.connection import Connection
from trainway.jobs.shell.far_end import PART, Refused, receive, tail_offset

EVIL = "$(touch x);'\"\n -rf\\"


def nothing(line: str) -> None:
    pass


def tree(root: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_a_tree_arrives_and_comes_back_as_it_is(connection: Connection, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / EVIL / "empty").mkdir(parents=True)
    (source / EVIL / EVIL).write_text(EVIL)
    (source / "big").write_bytes(os.urandom(3_000_001))
    (source / "none").touch()
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o4777)
    (source / "private").write_text("mine")
    (source / "private").chmod(0o600)
    (source / "link").symlink_to("./big")
    said: list[str] = []
    to = f"{tmp_path}/there/{EVIL}"
    connection.upload(source, to, said.append)
    assert tree(Path(to)) == tree(source)
    assert (Path(to) / EVIL / "empty").is_dir()
    modes = {name: stat.S_IMODE((Path(to) / name).stat().st_mode) for name in ("run", "private", "none")}
    assert modes == {"run": 0o755, "private": 0o600, "none": 0o644}
    # again: files by their hash, not by their date
    (Path(to) / "none").unlink()
    (Path(to) / EVIL / EVIL).write_text(EVIL[::-1])
    said.clear()
    connection.upload(source, to, said.append)
    assert tree(Path(to)) == tree(source)
    assert said[-1].startswith(f"{len(EVIL)} bytes to ")
    connection.download(to, tmp_path / "back", nothing)
    assert tree(tmp_path / "back") == tree(source)
    assert not list((tmp_path / "home").iterdir())


def test_one_file_goes_under_the_name_it_is_given(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("content")
    connection.upload(tmp_path / "a", f"{tmp_path}/new/b", nothing)
    connection.download(f"{tmp_path}/new/b", tmp_path / "newer" / "c", nothing)
    assert (tmp_path / "newer" / "c").read_text() == "content"
    assert os.listdir(tmp_path / "new") == ["b"]
    with pytest.raises(DataError, match="there is no"):
        connection.download(f"{tmp_path}/nothing", tmp_path / "d", nothing)


def test_an_upload_that_is_cut_goes_on_where_it_was(
    server: Server, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRY_S", (0.1,) * 20)
    (tmp_path / "big").write_bytes(os.urandom(64 << 20))
    part = tmp_path / "there" / f"big{PART}"
    cut_at: list[int] = []

    def cut() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if part.exists() and (size := part.stat().st_size) > 8 << 20:
                if server.cut():
                    cut_at.append(size)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=cut)
    thread.start()
    said: list[str] = []
    connection.upload(tmp_path / "big", str(tmp_path / "there" / "big"), said.append)
    thread.join()
    assert cut_at, "it was over before it could be cut"
    assert (tmp_path / "there" / "big").read_bytes() == (tmp_path / "big").read_bytes()
    assert not part.exists()
    assert any(line.startswith("goes on after ") for line in said), said


def test_an_upload_whose_machine_is_gone_is_given_up_and_the_next_goes_on(
    server: Server, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRY_S", (0.01,) * 3)
    (tmp_path / "big").write_bytes(os.urandom(32 << 20))
    part = tmp_path / "there" / f"big{PART}"

    def stop() -> None:
        if part.exists() and part.stat().st_size > 4 << 20 and server.process is not None:
            server.stop()

    moved = transfer._Progress.moved
    monkeypatch.setattr(transfer._Progress, "moved", lambda self, size: (stop(), moved(self, size))[1])
    said: list[str] = []
    with pytest.raises(ConnectionLost, match="cannot be reached by SSH") as lost:
        connection.upload(tmp_path / "big", str(tmp_path / "there" / "big"), said.append)
    assert lost.value.code == ExitCode.ENVIRONMENT
    assert not (tmp_path / "there" / "big").exists() and part.stat().st_size > 4 << 20
    monkeypatch.undo()
    server.start()
    said.clear()
    connection.upload(tmp_path / "big", str(tmp_path / "there" / "big"), said.append)
    assert said[0].startswith("goes on after ") and not part.exists()
    assert (tmp_path / "there" / "big").read_bytes() == (tmp_path / "big").read_bytes()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, which only root may have."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_there_ends_it_and_room_lets_it_go_on(
    connection: Connection, tmp_path: Path
) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.mkdir()
    for name in ("first", "second"):
        (source / name).write_bytes(os.urandom(3 << 20))
    with small_disk(there, "5m"):
        with pytest.raises(EnvironmentFault, match="No space left on device") as full:
            connection.upload(source, str(there), nothing)
        assert f"{there}/second{PART}: " in full.value.what and full.value.code == ExitCode.ENVIRONMENT
        assert (there / "first").read_bytes() == (source / "first").read_bytes()
        assert not (there / "second").exists()  # nothing that is not whole has its name
        subprocess.run(["mount", "-o", "remount,size=20m", str(there)], check=True)
        said: list[str] = []
        connection.upload(source, str(there), said.append)
        assert said[0].startswith("goes on after ")
        assert (there / "second").read_bytes() == (source / "second").read_bytes()


def test_a_file_that_the_system_there_refuses_is_named_and_not_tried_again(tmp_path: Path) -> None:
    """A limit on the size of files is what anybody may set: as with a full disk, a write fails half way."""
    needs_sshd()
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "python3").write_text(f'#!/bin/sh\nulimit -f 2048\nexec {shlex.quote(sys.executable)} "$@"\n')
    (shims / "python3").chmod(0o755)
    server = new_server(
        tmp_path / "sshd", plain_environment(tmp_path / "home", PATH=f"{shims}:/usr/bin:/bin")
    )
    (tmp_path / "big").write_bytes(os.urandom(8 << 20))
    server.start()
    try:
        connection = Connection(server.address, tmp_path / "known_hosts")
        said: list[str] = []
        with pytest.raises(EnvironmentFault, match="File too large") as refused:
            connection.upload(tmp_path / "big", str(tmp_path / "there" / "big"), said.append)
    finally:
        server.stop()
    assert f"{tmp_path}/there/big{PART}: " in refused.value.what
    assert not isinstance(refused.value, ConnectionLost) and not any("going on in" in line for line in said)
    assert not (tmp_path / "there" / "big").exists()


def test_a_damaged_part_is_not_built_upon(connection: Connection, tmp_path: Path) -> None:
    content = os.urandom(2_000_000)
    (tmp_path / "a").write_bytes(content)
    there = tmp_path / "there"
    there.mkdir()
    (there / f"a{PART}").write_bytes(b"\0" + content[1:1_500_000])
    said: list[str] = []
    connection.upload(tmp_path / "a", str(there / "a"), said.append)
    assert (there / "a").read_bytes() == content
    assert said[-1].startswith("1.9 MiB to ")  # all of it
    # and a good one is
    (there / "a").unlink()
    (there / f"a{PART}").write_bytes(content[:1_500_000])
    connection.upload(tmp_path / "a", str(there / "a"), said.append)
    assert (there / "a").read_bytes() == content
    assert said[-1].startswith("488.3 KiB to ")


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "sub/../../outside"])
def test_a_link_that_leads_out_is_refused(connection: Connection, tmp_path: Path, target: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="cannot be uploaded") as refused:
        connection.upload(tmp_path / "source", str(tmp_path / "there"), nothing)
    assert "leads out of the directory" in refused.value.why
    assert not (tmp_path / "there").exists()


def frames(*entries: dict[str, object], content: bytes = b"") -> io.BytesIO:
    import hashlib

    lines = b""
    for entry in entries:
        lines += json.dumps(entry).encode() + b"\n"
        if "size" in entry:
            lines += content + hashlib.sha256(content).hexdigest().encode() + b"\n"
    return io.BytesIO(lines + b'{"end": true}\n')


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "../evil", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "/tmp/evil", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "a/../../evil", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "a//b", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "a\0b", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "out/evil", "size": 4, "mode": 0o644, "offset": 0},
        {"path": "link", "link": "../../evil"},
        {"path": "link", "link": "/etc"},
        {"path": "link", "link": ""},
    ],
)
def test_a_machine_that_lies_writes_nothing_outside(tmp_path: Path, entry: dict[str, object]) -> None:
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(Refused):
        receive(str(root), frames(entry, content=b"evil"), lambda done: None)
    assert os.listdir(tmp_path / "outside") == [] and os.listdir(root) == ["out"]
    with pytest.raises(Refused, match="nobody asked"):
        receive(str(root), frames({"path": "b", "link": "c"}), lambda done: None, names={"a": "a"})


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "outside")
    entry = {"path": "a", "size": 4, "mode": 0o777, "offset": 0}
    receive(str(root), frames(entry, content=b"evil"), lambda done: None)
    assert (tmp_path / "outside").read_text() == "mine"
    assert (root / "a").read_bytes() == b"evil" and not (root / "a").is_symlink()
    (root / f"b{PART}").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        receive(str(root), frames({**entry, "path": "b"}, content=b"evil"), lambda done: None)
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_wrong_hash_leaves_nothing(tmp_path: Path) -> None:
    stream = io.BytesIO(
        frames({"path": "a", "size": 4, "mode": 420, "offset": 0}, content=b"evil").getvalue()
    )
    stream = io.BytesIO(stream.getvalue().replace(b"evil", b"Evil"))
    done: list[dict[str, object]] = []
    receive(str(tmp_path), stream, done.append)
    assert done == [{"path": "a", "ok": False}, {"end": True}]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"a\n", b"a", b"a\nb\nc\n", b"a\nb\nc", b"\n\n\n", b"x" * 3000 + b"\ny\n"]
)
@pytest.mark.parametrize("lines", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("block", [1, 2, 1024])
def test_the_last_lines_begin_where_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, lines: int, block: int
) -> None:
    monkeypatch.setattr(far_end, "BLOCK", block)
    path = tmp_path / "log"
    path.write_bytes(content)
    whole = content.splitlines(keepends=True)
    wanted = (
        whole[max(0, len(whole) - lines) :]
        if lines
        else whole[-1:]
        if content and content[-1:] != b"\n"
        else []
    )
    assert content[tail_offset(str(path), lines) :] == b"".join(wanted)
