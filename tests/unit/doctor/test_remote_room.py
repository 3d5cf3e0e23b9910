"""Room for data in object storage: asked of the store, and named where it cannot be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.data import remote_sources
from trainway.doctor import needs
from trainway.doctor.disk import Room, judge_room
from trainway.errors import EnvironmentFault
from trainway.recipes.volume import GZIP_FACTOR, STORE_SHARE
from trainway.storage.store import DirectoryStore

GIB = 2**30


def config(tmp_path: Path) -> RunConfig:
    local = tmp_path / "local.jsonl"
    local.write_text("x" * 1000)
    return load_config(
        "cpu_small",
        {
            "data.train": [str(local), "s3://bucket/corpus"],
            "data.validation": ["s3://bucket/val.jsonl"],
            "data.store_dir": str(tmp_path / "cache"),
        },
        environ={},
    ).config


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """s3://bucket as a directory."""
    monkeypatch.setattr(
        remote_sources,
        "open_store",
        lambda base, backoff=None: DirectoryStore(tmp_path / base.removeprefix("s3://")),
    )
    (tmp_path / "bucket" / "corpus").mkdir(parents=True)
    return tmp_path / "bucket"


def data_need(found: RunConfig) -> needs.Need:
    (need,) = [need for need in needs.disk_needs(found, {}) if need.what.startswith("prepared data")]
    return need


def test_the_store_is_asked_and_what_is_fetched_counts_too(bucket: Path, tmp_path: Path) -> None:
    (bucket / "corpus" / "a.jsonl").write_text("x" * 20_000)
    (bucket / "corpus" / "b.jsonl.gz").write_bytes(b"x" * 5_000)
    (bucket / "corpus" / "picture.png").write_bytes(b"x" * 9_000)  # no data
    (bucket / "val.jsonl").write_text("x" * 3_000)
    need = data_need(config(tmp_path))
    text = 1_000 + 20_000 + 5_000 * GZIP_FACTOR + 3_000
    assert need.num_bytes == int(STORE_SHARE * text) + 28_000
    assert (need.what, need.note) == ("prepared data and what is fetched for it", "")


def test_a_store_that_cannot_be_asked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(base: str, backoff: object = None) -> None:
        raise EnvironmentFault("s3fs is not installed")

    monkeypatch.setattr(remote_sources, "open_store", silent)
    need = data_need(config(tmp_path))
    assert need.num_bytes == int(STORE_SHARE * 1_000)
    note = "s3://bucket/corpus, s3://bucket/val.jsonl cannot be asked, and is not counted"
    assert need.note == note
    (told,) = judge_room(Room(1, 50 * GIB, None), [need])
    assert told.level == "ok" and told.what.endswith(f"0 MiB are needed; {note}")
    (told,) = judge_room(Room(1, 10, None), [need])
    assert told.level == "failure" and note in told.why
