"""The token store: what is written is read, across parts, and every altered file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainway.data.store import StoreManifest, StoreWriter, TokenStore
from trainway.errors import DataError

FACTS: dict[str, Any] = {
    "tokenizer_hash": "h",
    "bos_id": 0,
    "eos_id": 1,
    "pad_id": 2,
    "sources": {},
    "quarantined": 0,
}
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]


def write(path: Path, vocab_size: int = 100, part_bytes: int = 1 << 30, batch: int = 3) -> StoreManifest:
    path.mkdir()
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    tokens = np.arange(sum(LENGTHS)) + 3
    with StoreWriter(path, vocab_size, part_bytes) as writer:
        at = 0
        for first in range(0, len(LENGTHS), batch):
            lengths = np.array(LENGTHS[first : first + batch])
            writer.append("train", tokens[at : at + lengths.sum()], lengths, int(lengths.sum()) * 4)
            at += int(lengths.sum())
        writer.append("val", np.array([7, 1]), np.array([2]), 5)
        assert writer.documents("train") == 8
        return writer.finish(np.arange(vocab_size), **FACTS)


@pytest.mark.parametrize("part_bytes", [1 << 30, 16, 2])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_stream_does_not_depend_on_batches_and_parts(tmp_path: Path, part_bytes: int, batch: int) -> None:
    manifest = write(tmp_path / "s", part_bytes=part_bytes, batch=batch)
    store = TokenStore.open(tmp_path / "s")
    assert store.manifest == manifest
    split = store.split("train")
    total = sum(LENGTHS)
    assert (split.num_tokens, split.num_documents, split.eos_id) == (total, 8, 1)
    assert len(manifest.splits["train"]["parts"]) == {1 << 30: 1, 16: 4, 2: 8}[part_bytes]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    for start in range(total + 1):
        for stop in range(start, total + 1):
            assert split.tokens(start, stop).tolist() == list(range(start + 3, stop + 3))
            expected = [s for s in starts.tolist() if start <= s < stop]
            assert split.document_starts(start, stop).tolist() == expected


def test_manifest(tmp_path: Path) -> None:
    manifest = write(tmp_path / "s")
    assert manifest.splits["train"]["tokens"] == 31
    assert manifest.splits["train"]["text_bytes"] == 124
    assert manifest.splits["val"]["documents"] == 1
    assert manifest.files["train-00000.bin"]["bytes"] == 62
    assert manifest.files["train-00000.idx"]["bytes"] == 72
    assert set(manifest.files) == {
        *(f"{split}-00000.{suffix}" for split in ("train", "val") for suffix in ("bin", "idx")),
        "token_bytes.bin",
        "tokenizer/tokenizer.json",
    }
    assert TokenStore.open(tmp_path / "s").token_bytes.tolist() == list(range(100))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_the_type_of_the_tokens_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert write(tmp_path / "s", vocab_size).dtype == dtype
    split = TokenStore.open(tmp_path / "s").split("train")
    assert split.tokens(0, 1).dtype == np.dtype(dtype)
    assert split.tokens(5, 8).tolist() == [8, 9, 10]


FILES = ["train-00000.bin", "train-00000.idx", "val-00000.bin", "token_bytes.bin", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "flipped"])
def test_an_altered_file_is_named(tmp_path: Path, name: str, fault: str) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s" / name
    data = bytearray(file.read_bytes())
    match fault:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "truncated":
            file.write_bytes(data[:-1])
        case "flipped":
            data[len(data) // 2] ^= 16
            file.write_bytes(data)
    message = {
        "missing": "missing",
        "empty": "it is empty",
        "truncated": "bytes; the manifest says",
        "flipped": "hash",
    }
    with pytest.raises(DataError, match=rf"{name}[\s\S]*{message[fault]}"):
        TokenStore.open(tmp_path / "s")
    if fault != "flipped":  # noticed without reading the files
        with pytest.raises(DataError, match=name):
            TokenStore.open(tmp_path / "s", verify=False)


def test_a_change_of_any_byte_of_the_manifest_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"manifest\.json"):
            TokenStore.open(tmp_path / "s", verify=False)
    path.write_bytes(good)
    TokenStore.open(tmp_path / "s")


def test_extra_parts_and_bad_manifests_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    extra = tmp_path / "s" / "train-00001.bin"
    extra.write_bytes(b"ab")
    with pytest.raises(DataError, match=r"train-00001\.bin: does not belong"):
        TokenStore.open(tmp_path / "s")
    extra.unlink()
    path = tmp_path / "s" / "manifest.json"
    good = json.loads(path.read_text())
    without = {name: value for name, value in good.items() if name != "files"}
    altered: list[Any] = [[], {**good, "format": 99}, {**good, "extra": 1}, without]
    good.pop("checksum")
    for bad in altered:
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=r"manifest\.json: altered"):
            TokenStore.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(DataError, match=r"manifest\.json: the file is missing"):
        TokenStore.open(tmp_path / "s")
    with pytest.raises(DataError, match="no such token store"):
        TokenStore.open(tmp_path / "t")
