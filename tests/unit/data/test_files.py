"""Atomic files: all or nothing, and faults of the disk as errors that say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import xxhash

from trainway import files
from trainway.errors import DataError, EnvironmentFault


def test_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "a", "é")
    files.atomic_write(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    files.atomic_write(tmp_path / "a", "old")

    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(EnvironmentFault, match=r"cannot write .*a\n.*" + os.strerror(code)):
        files.atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "deep" / "d") as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "x").write_text("1")
        assert not (tmp_path / "deep" / "d").exists()
        assert temp.parent == tmp_path / "deep"
        assert temp.name.startswith("d.tmp-")
    assert (tmp_path / "deep" / "d" / "sub" / "x").read_text() == "1"

    def fail() -> None:
        with files.atomic_directory(tmp_path / "e") as temp:
            (temp / "x").write_text("1")
            raise KeyError("boom")

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == ["deep"]
    with pytest.raises(FileExistsError), files.atomic_directory(tmp_path / "deep"):
        pass


def test_hash_file_is_xxh3_128_over_block_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HASH_BLOCK_BYTES", 7)
    for size in (0, 6, 7, 8, 100):
        (tmp_path / "f").write_bytes(data := bytes(range(size)))
        assert files.hash_file(tmp_path / "f") == xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"{\n 'a'}", "line 2, column 2"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "deep"),
    ],
)
def test_read_json_names_the_file_and_the_place(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"m\.json[\s\S]*{message}"):
        files.read_json(tmp_path / "m.json")
