"""Trees copied both ways: verified, gone on with, and never taken for whole when they are not."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from tests.copied_runs import DyingStore, Killed
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.storage import transfer
from trainway.storage.address import Address
from trainway.storage.ledger import LEDGER, read_ledger
from trainway.storage.retry import Backoff
from trainway.storage.store import Changed, Content, DirectoryStore, Entry, FsspecStore
from trainway.storage.transfer import Copied, copy_tree, fetch

FILES = {
    "a.txt": b"alpha",
    "deep/er/b.bin": bytes(range(256)) * 400,
    "empty": b"",
    "we ird $(x)'\".txt": b"w",
}


def make(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tree_goes_there_and_back(tmp_path: Path) -> None:
    source, there = make(tmp_path / "source"), f"file://{tmp_path}/there"
    total = sum(map(len, FILES.values()))
    assert copy_tree(source, there) == Copied(4, 0, total)
    assert copy_tree(source, there) == Copied(0, 4, 0)
    assert copy_tree(there, tmp_path / "back") == Copied(4, 0, total)
    assert tree(tmp_path / "back") == FILES
    (tmp_path / "back" / "a.txt").write_bytes(b"alphx")
    assert copy_tree(there, tmp_path / "back") == Copied(1, 3, 5)
    assert tree(tmp_path / "back") == FILES


def test_a_tree_that_was_killed_halfway_is_refused_and_then_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = make(tmp_path / "source"), tmp_path / "there"
    monkeypatch.setattr(transfer, "open_store", lambda place, backoff: DyingStore(there, 3))
    with pytest.raises(Killed):
        copy_tree(source, there)
    monkeypatch.setattr(transfer, "open_store", lambda place, backoff: DirectoryStore(there))
    ledger = read_ledger(DirectoryStore(there), "")
    assert ledger is None or not ledger.complete
    copy_tree(source, there)
    (source / "a.txt").write_bytes(b"beta")
    monkeypatch.setattr(transfer, "open_store", lambda place, backoff: DyingStore(there, 2))
    with pytest.raises(Killed):  # changed since: what is there is whole no more, and says so
        copy_tree(source, there)
    with pytest.raises(DataError, match="not complete"):
        copy_tree(f"file://{there}", tmp_path / "back")


def test_a_copy_that_was_altered_there_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "there"
    copy_tree(make(tmp_path / "source"), there)
    (there / "a.txt").write_bytes(b"alphx")
    with pytest.raises(DataError, match=r"a\.txt: altered"):
        copy_tree(f"file://{there}", tmp_path / "back")
    assert not (tmp_path / "back" / "a.txt").exists()
    (there / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt is missing"):
        copy_tree(f"file://{there}", tmp_path / "back")


def test_an_interrupted_download_is_gone_on_with(tmp_path: Path) -> None:
    asked: list[int] = []

    class Cut(DirectoryStore):
        def get(self, name: str, entry: Entry, to: Path) -> None:
            data = (self.folder / name).read_bytes()
            start = to.stat().st_size if to.exists() else 0
            asked.append(start)
            with to.open("ab") as file:
                file.write(data[start : start + 600])
            if start + 600 < len(data):
                raise EnvironmentFault("the network is gone")

    make(tmp_path / "there", {"big": bytes(1000)})
    store, entry = Cut(tmp_path / "there"), Entry(1000)
    with pytest.raises(EnvironmentFault):
        fetch(store, "", "big", entry, tmp_path / "big", None)
    assert not (tmp_path / "big").exists()
    assert fetch(store, "", "big", entry, tmp_path / "big", None)
    assert asked == [0, 600]
    assert (tmp_path / "big").read_bytes() == bytes(1000)


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(tmp_path: Path) -> None:
    class Replaced(DirectoryStore):
        def get(self, name: str, entry: Entry, to: Path) -> None:
            raise Changed

    make(tmp_path / "there", {"x": b"1"})
    with pytest.raises(DataError, match="replaced while it was read"):
        fetch(Replaced(tmp_path / "there"), "", "x", Entry(1), tmp_path / "x", None)


def test_names_from_a_store_cannot_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unsafe name"):
        fetch(DirectoryStore(tmp_path), "", "../x", Entry(1), tmp_path / "x", None)


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"):
        copy_tree("s3://a/b", "s3://a/c")
    with pytest.raises(DataError, match="is missing"):
        copy_tree(tmp_path / "nothing", tmp_path / "there")
    with pytest.raises(DataError, match="holds nothing"):
        copy_tree(f"file://{tmp_path}/nothing", tmp_path / "back")
    assert not (tmp_path / "there" / LEDGER).exists()


def test_any_file_system_of_fsspec_does(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    store = FsspecStore(Address("gs", "bucket-of-test", "a"), files, Backoff(2, 0.0, 0.0))
    path = make(tmp_path / "source") / "deep/er/b.bin"
    entry = store.put("x/b.bin", Content.of_file(path))
    store.put("c", Content.of_bytes(b"see"))
    assert set(store.entries()) == {"x/b.bin", "c"}
    assert set(store.entries("x/")) == {"x/b.bin"}
    assert store.read("c", 10) == b"see"
    assert store.read("nothing", 10) is None
    with pytest.raises(DataError, match="larger than"):
        store.read("x/b.bin", 10)
    store.get("x/b.bin", entry, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    with pytest.raises(Changed):
        store.get("x/b.bin", Entry(entry.size + 1), tmp_path / "other")
    store.delete(["c", "nothing"])
    assert set(store.entries()) == {"x/b.bin"}
