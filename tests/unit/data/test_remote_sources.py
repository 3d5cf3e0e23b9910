"""Sources in object storage: which objects a name or a pattern stands for, fetched once and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainway.config.schema import DataConfig, SourceConfig
from trainway.data import remote_sources
from trainway.data.remote_sources import look_up, with_fetched_sources
from trainway.data.sources import find_sources
from trainway.errors import ConfigError, DataError
from trainway.storage.store import DirectoryStore

OBJECTS = (
    "a.jsonl",
    "b.jsonl.gz",
    "c.txt",
    "deep/d.jsonl",
    "deep/er/e.jsonl",
    "notes.xyz",
    ".hidden.jsonl",
    "shards/manifest.json",
)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of s3://bucket; asked for anything else it is empty."""
    folder = tmp_path / "bucket"
    for name in OBJECTS:
        (folder / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "corpus" / name).write_text(json.dumps({"text": name}) + "\n")
    place = {"s3://bucket": folder}
    monkeypatch.setattr(
        remote_sources,
        "open_store",
        lambda base, backoff=None: DirectoryStore(
            Path(str(place["s3://bucket"]) + base.removeprefix("s3://bucket"))
        ),
    )
    return folder


def fetched(path: str, cache: Path) -> set[str]:
    """The names below the cache's folder of files after the sources of `path` were fetched, found as local ones."""
    data = with_fetched_sources(DataConfig(train=(path,)), cache, lambda *progress: None)
    (local,) = data.train
    assert isinstance(local, str) and local.startswith(str(cache.absolute()))
    found = find_sources([local], data, setting="data.train")
    return {source.path.name for source in found}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/corpus/a.jsonl", {"a.jsonl"}),
        ("s3://bucket/corpus/*.jsonl", {"a.jsonl"}),
        ("s3://bucket/corpus/*.jsonl*", {"a.jsonl", "b.jsonl.gz"}),
        ("s3://bucket/corpus/[ac].*", {"a.jsonl", "c.txt"}),
        ("s3://bucket/corpus/**/*.jsonl", {"a.jsonl", "d.jsonl", "e.jsonl"}),
        ("s3://bucket/corpus/deep", {"d.jsonl", "e.jsonl"}),
        ("s3://bucket/corp*/deep/?.jsonl", {"d.jsonl"}),
    ],
)
def test_an_address_stands_for_what_a_path_would(
    bucket: Path, tmp_path: Path, path: str, expected: set[str]
) -> None:
    assert look_up(path, tmp_path / "cache")[0] == len(expected)
    assert fetched(path, tmp_path / "cache") == expected


def test_it_is_fetched_once_with_its_hashes_noted(bucket: Path, tmp_path: Path) -> None:
    fetched("s3://bucket/corpus/*.jsonl", tmp_path)
    (origin,) = tmp_path.glob(".remote/*/origin.json")
    facts = json.loads(origin.read_text())
    assert facts["address"] == "s3://bucket/corpus/*.jsonl"
    assert [(file["name"], file["size"], len(file["xxh3_128"])) for file in facts["files"]] == [
        ("a.jsonl", 20, 32)
    ]
    for path in bucket.rglob("*.jsonl"):
        path.unlink()
    assert fetched("s3://bucket/corpus/*.jsonl", tmp_path) == {"a.jsonl"}
    assert look_up("s3://bucket/corpus/*.jsonl", tmp_path) == (1, 20)


def test_what_is_not_there(bucket: Path, tmp_path: Path) -> None:
    for path in ("s3://bucket/corpus/z.jsonl", "s3://bucket/nothing/*.jsonl", "s3://bucket/corpus/*.xyz"):
        with pytest.raises(DataError, match="holds no data"):
            fetched(path, tmp_path)
        with pytest.raises(DataError, match="holds no data"):
            look_up(path, tmp_path)
    absent = SourceConfig(path="s3://bucket/corpus/z.jsonl", optional=True)
    data = with_fetched_sources(DataConfig(train=(absent,)), tmp_path, lambda *progress: None)
    (source,) = data.train
    assert isinstance(source, SourceConfig)
    assert (source.optional, source.name, Path(source.path).exists()) == (True, absent.path, False)


def test_local_sources_stay_as_they_are_and_logins_are_refused(tmp_path: Path) -> None:
    data = DataConfig(train=("a.jsonl", "owner/name"))
    assert with_fetched_sources(data, tmp_path, lambda *progress: None) is data
    with pytest.raises(ConfigError) as caught:
        with_fetched_sources(DataConfig(train=("s3://me:canary@bucket/x",)), tmp_path, lambda *progress: None)
    assert "canary" not in str(caught.value)
