"""Preparation: the right tokens in the right split, made once, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from trainway.config.schema import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from trainway.data import hash_memory as memory_module
from trainway.data import prepare as module
from trainway.data import shards as shards_module
from trainway.data import store as store_module
from trainway.data import tokenise as tokenise_module
from trainway.data import turns as turns_module
from trainway.data.documents import HeldOut, sample_texts
from trainway.data.prepare import PreparedData, prepare
from trainway.data.sources import find_sources
from trainway.data.store import TokenStore
from trainway.data.tokenizer import load_tokenizer, train_tokenizer
from trainway.data.turns import turn
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.files import hash_file

TEXTS = [
    f"Document {i}: " + f"the number {i * i} is a square, <|eos|> is text. " * (i % 7 + 1) for i in range(300)
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepare") / "bundle"
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400), path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(tmp_path: Path, bundle: Path | None, **data: Any) -> RunConfig:
    data = {"train": ("corpus.jsonl",), "val_ratio": 0.1, **data}
    tokenizer = TokenizerConfig(path=str(bundle)) if bundle else TokenizerConfig(vocab_size=400)
    return RunConfig(data=DataConfig(**data), tokenizer=tokenizer, seed=data.pop("seed", 42))


def kept(root: Path) -> list[str]:
    """Suffixes of what is in the cache, beside the hidden directory of what is known about the sources."""
    cache = root / "cache"
    names = [path for path in cache.iterdir() if path.name != ".sources"] if cache.exists() else []
    return sorted(path.suffix for path in names)


def documents(prepared: PreparedData, split: Any) -> list[str]:
    """The store's documents, decoded; checks the frame of bos and eos on the way."""
    stream = TokenStore.open(prepared.store_dir).split(split)
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    starts = [*stream.document_starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    found = []
    for start, stop in itertools.pairwise(starts):
        ids = stream.tokens(start, stop).tolist()
        assert (ids[0], ids[-1]) == (0, 1)
        assert not {0, 1, 2} & set(ids[1:-1])
        found.append(tokenizer.decode(ids[1:-1]))
    return found


def test_every_document_is_stored_on_its_side(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    prepared = prepare(settings(tmp_path, bundle), root=tmp_path)
    held_out = [xxhash.xxh3_64_intdigest(text.encode(), 42) < 0.1 * 2**64 for text in TEXTS]
    assert documents(prepared, "val") == [text for text, out in zip(TEXTS, held_out, strict=True) if out]
    assert documents(prepared, "train") == [
        text for text, out in zip(TEXTS, held_out, strict=True) if not out
    ]
    assert 10 < sum(held_out) < 60
    splits = prepared.manifest.splits
    assert splits["train"]["text_bytes"] + splits["val"]["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert prepared.manifest.sources["train"][0]["size"] == corpus.stat().st_size
    assert f"{splits['train']['tokens']:,} tokens for training" in prepared.summary


def test_the_side_depends_on_the_text_alone(tmp_path: Path, bundle: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS + TEXTS[::-1])
    prepared = prepare(settings(tmp_path, bundle), root=tmp_path)
    train, val = documents(prepared, "train"), documents(prepared, "val")
    assert not set(train) & set(val)
    assert len(train) == 2 * len(set(train))
    other = prepare(settings(tmp_path, bundle).model_copy(update={"seed": 7}), root=tmp_path)
    assert set(documents(other, "val")) != set(val)


def test_a_second_call_finds_the_store(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(settings(tmp_path, bundle), root=tmp_path)
    monkeypatch.setattr(module, "_build", None)  # would fail if it were called
    second = prepare(settings(tmp_path, bundle), root=tmp_path)
    assert (first.cached, second.cached) == (False, True)
    assert (second.store_dir, second.manifest) == (first.store_dir, first.manifest)
    corpus.rename(tmp_path / "renamed.jsonl")
    assert prepare(settings(tmp_path, bundle, train=("renamed.jsonl",)), root=tmp_path).cached


def test_what_changes_the_store_changes_its_name(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    write_corpus(tmp_path / "other.jsonl", TEXTS[:50])
    base = settings(tmp_path, bundle)
    variants = [
        base,
        settings(tmp_path, bundle, val_ratio=0.2),
        settings(tmp_path, bundle, validation=("other.jsonl",)),
        settings(tmp_path, bundle, train=("corpus.jsonl", "other.jsonl")),
        settings(tmp_path, bundle, train=("other.jsonl", "corpus.jsonl")),
        settings(tmp_path, bundle, max_document_mib=1),
        settings(tmp_path, bundle, on_bad_record="quarantine"),
        settings(tmp_path, None),
        base.model_copy(update={"seed": 43}),
    ]
    found = {prepare(config, root=tmp_path).store_dir.name for config in variants}
    assert len(found) == len(variants)
    corpus.write_text(corpus.read_text().replace("Document 5:", "Document V:"))
    assert prepare(base, root=tmp_path).store_dir.name not in found


def test_an_altered_store_is_refused(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    file = prepare(settings(tmp_path, bundle), root=tmp_path).store_dir / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin: altered[\s\S]*delete the directory"):
        prepare(settings(tmp_path, bundle), root=tmp_path)


def test_the_store_does_not_depend_on_batches_and_threads(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(settings(tmp_path, bundle, store_dir="a"), root=tmp_path)
    monkeypatch.setattr(tokenise_module, "BATCH_BYTES", 700)
    monkeypatch.setattr(tokenise_module, "ENCODER_THREADS", 5)
    second = prepare(settings(tmp_path, bundle, store_dir="b"), root=tmp_path)
    assert first.manifest.files == second.manifest.files


def test_a_tokenizer_is_trained_on_training_documents_alone(tmp_path: Path, bundle: Path) -> None:
    texts = [*TEXTS, *(f"validationonlyword {i}" for i in range(50))]
    write_corpus(tmp_path / "corpus.jsonl", texts[:300])
    write_corpus(tmp_path / "val.jsonl", texts[300:])
    prepared = prepare(settings(tmp_path, None, validation=("val.jsonl",)), root=tmp_path)
    vocabulary = load_tokenizer(prepared.tokenizer_dir).get_vocab()
    assert "Ġsquare" in vocabulary
    assert not any("validation" in token for token in vocabulary)
    assert documents(prepared, "val") == texts[300:]
    assert documents(prepared, "train") == texts[:300]


def test_the_sample_takes_from_every_file(tmp_path: Path) -> None:
    config = settings(tmp_path, None, train=("c*.jsonl",))
    for name in "abd":
        write_corpus(tmp_path / f"c{name}.jsonl", [f"{name} " * 1000] * 1000)
    sources = find_sources(["c*.jsonl"], config.data, setting="x", root=tmp_path)
    texts = list(sample_texts(sources, config.data, HeldOut(RunConfig()), 600_000, []))
    assert [text[0] for text in texts] == ["a"] * 100 + ["b"] * 100 + ["d"] * 100


BAD = '{"text": "ok"}\n{"text": 1}\nnot json\n' + '{"text": ""}\n' * 25


@pytest.mark.parametrize("trained", [False, True])
def test_bad_records_are_all_listed_and_nothing_else_is_kept(
    tmp_path: Path, corpus: Path, bundle: Path, trained: bool
) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD)
    config = settings(
        tmp_path, None if trained else bundle, train=("bad.jsonl", "corpus.jsonl", "worse.jsonl")
    )
    (tmp_path / "worse.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="28 malformed records") as raised:
        prepare(config, root=tmp_path)
    assert f"{tmp_path}/bad.jsonl:2: field 'text': is a number, not a string" in raised.value.why
    assert raised.value.why.endswith("and 8 more")
    listed = [
        json.loads(line) for line in (tmp_path / "cache" / "bad-records.jsonl").read_text().splitlines()
    ]
    assert len(listed) == 28
    assert listed[0]["line"] == 2
    assert listed[-1]["source"].endswith("worse.jsonl")
    assert kept(tmp_path) == [".jsonl", ".lock"]


def test_quarantine_sets_bad_records_aside(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD)
    config = settings(tmp_path, bundle, train=("bad.jsonl", "corpus.jsonl"), on_bad_record="quarantine")
    prepared = prepare(config, root=tmp_path)
    assert prepared.manifest.quarantined == 27
    assert "27 malformed records set aside" in prepared.summary
    lines = (prepared.store_dir / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["line"] == 3
    assert len(lines) == 27
    assert sorted(documents(prepared, "train") + documents(prepared, "val")) == sorted(["ok", *TEXTS])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": ()}, ConfigError, "data.train names no source"),
        ({"val_ratio": 0}, ConfigError, "leaves no validation document"),
        ({"val_ratio": 1}, ConfigError, "leaves no training document"),
        ({"val_ratio": 1e-9}, DataError, "there is no validation document"),
        ({"val_ratio": 1 - 1e-9}, DataError, "there is no training document"),
        ({"train": ("gone.jsonl",)}, DataError, r"data\.train: .*gone\.jsonl is missing"),
        ({"validation": ("gone.jsonl",)}, DataError, r"data\.validation: .*gone\.jsonl is missing"),
    ],
)
def test_what_cannot_be_prepared(
    tmp_path: Path, corpus: Path, bundle: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(settings(tmp_path, bundle, **change), root=tmp_path)
    assert kept(tmp_path) in ([], [".lock"])


def test_a_truncated_gzip_file_leaves_nothing(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    import gzip

    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes())[:-500])
    with pytest.raises(DataError, match=r"z\.jsonl\.gz: truncated or corrupt"):
        prepare(settings(tmp_path, bundle, train=("corpus.jsonl", "z.jsonl.gz")), root=tmp_path)
    assert kept(tmp_path) == [".lock"]


@pytest.mark.parametrize("reused", [False, True])
def test_a_model_with_too_few_rows_is_refused(
    tmp_path: Path, corpus: Path, bundle: Path, reused: bool
) -> None:
    config = settings(tmp_path, bundle if reused else None)
    config = config.model_copy(update={"model": ModelConfig(vocab_size=399)})
    with pytest.raises(ConfigError, match=r"model\.vocab_size 399 is smaller than .* 400"):
        prepare(config, root=tmp_path)


def test_a_full_disk_leaves_no_store(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.StoreWriter, "_write", full)
    with pytest.raises(
        EnvironmentFault, match=r"cannot write .*\nNo space left on device[\s\S]*free some space"
    ):
        prepare(settings(tmp_path, bundle), root=tmp_path)
    assert kept(tmp_path) == [".lock"]
    monkeypatch.undo()
    assert not prepare(settings(tmp_path, bundle), root=tmp_path).cached


def test_the_rest_of_a_killed_preparation_is_cleared(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    first = prepare(settings(tmp_path, bundle), root=tmp_path)
    stale = first.store_dir.with_name(first.store_dir.name + ".tmp-dead")
    first.store_dir.rename(stale)
    assert not prepare(settings(tmp_path, bundle), root=tmp_path).cached
    assert not stale.exists()


def _prepare_elsewhere(config: RunConfig, root: Path, results: Any) -> None:
    prepared = prepare(config, root=root)
    results.put((prepared.store_dir.name, prepared.cached))


def test_two_processes_at_once_make_one_store(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    config = settings(tmp_path, bundle)
    processes = [
        context.Process(target=_prepare_elsewhere, args=(config, tmp_path, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found[0][0] == found[1][0]
    assert [cached for _, cached in found] == [False, True]


def test_progress_reaches_the_end(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(settings(tmp_path, bundle), root=tmp_path, progress=lambda *call: seen.append(call))
    size = corpus.stat().st_size
    assert seen == [("hashing sources", size, size), ("tokenising", size, size)]


class Reads:
    """Counts the bytes that are hashed, file by file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for place in (memory_module, shards_module, store_module):
            original = place.hash_file  # type: ignore[attr-defined]

            def counted(path: Any, original: Any = original) -> str:
                self.names.append(Path(path).name)
                return str(original(path))

            monkeypatch.setattr(place, "hash_file", counted)

    def take(self) -> list[str]:
        names, self.names = sorted(self.names), []
        return names


def test_a_plain_file_is_hashed_once_until_it_changes(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "SETTLED_S", 0.0)
    config = settings(tmp_path, bundle)
    reads = Reads(monkeypatch)
    first = prepare(config, root=tmp_path)
    assert "corpus.jsonl" in reads.take()
    assert prepare(config, root=tmp_path).cached
    assert "corpus.jsonl" not in reads.take()
    status = corpus.stat()
    corpus.write_text(corpus.read_text().replace("Document 5:", "Document V:"))
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and tar do
    assert (corpus.stat().st_size, corpus.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    other = prepare(config, root=tmp_path)
    assert "corpus.jsonl" in reads.take()
    assert other.store_dir != first.store_dir


def test_a_file_that_may_still_change_is_not_remembered(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    for _ in range(2):
        prepare(settings(tmp_path, bundle), root=tmp_path)
        assert "corpus.jsonl" in reads.take()


def test_a_damaged_memory_of_hashes_is_ignored(
    tmp_path: Path, corpus: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "SETTLED_S", 0.0)
    first = prepare(settings(tmp_path, bundle), root=tmp_path)
    memory = tmp_path / "cache" / ".sources" / "hashes.json"
    for damaged in ("{", "[]", json.dumps({str(corpus): 3})):
        memory.write_text(damaged)
        assert prepare(settings(tmp_path, bundle), root=tmp_path).store_dir == first.store_dir


def make_shard(folder: Path) -> Path:
    folder.mkdir()
    shard = folder / "shard-0.txt"
    shard.write_text("\n".join(TEXTS))
    entry = {"file": shard.name, "bytes": shard.stat().st_size, "hash": hash_file(shard)}
    (folder / "manifest.json").write_text(json.dumps({"shards": [entry]}))
    return shard


def test_a_flipped_byte_in_a_shard_is_found_on_each_start(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "SETTLED_S", 0.0)
    shard = make_shard(tmp_path / "shards")
    config = settings(tmp_path, bundle, train=("shards",))
    for _ in range(2):
        prepare(config, root=tmp_path)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-0\.txt: the shard was altered"):
        prepare(config, root=tmp_path)


def test_who_waited_takes_what_was_checked_meanwhile(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a run start together: the bytes of sources and store are read once, not by each."""
    make_shard(tmp_path / "shards")
    config = settings(tmp_path, bundle, train=("shards",))
    began = time.time()
    first = prepare(config, root=tmp_path)
    reads = Reads(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(time=lambda: began))
        rank = prepare(config, root=tmp_path)  # it began before the first one was done
    assert reads.take() == []
    assert (rank.store_dir, rank.manifest, rank.cached) == (first.store_dir, first.manifest, True)
    prepare(config, root=tmp_path)  # it begins after
    found = reads.take()
    assert {"shard-0.txt", "train-00000.bin"} <= set(found)


def test_a_time_in_the_future_is_not_believed(tmp_path: Path) -> None:
    with turn(tmp_path / "x.lock") as own:
        assert not own.finished_since(0.0)
        began = time.time()
        own.finish()
        assert own.finished_since(began)
        assert not own.finished_since(time.time() + 1)
    (tmp_path / "x.lock").write_text(repr(time.time() + 3600))
    with turn(tmp_path / "x.lock") as own:
        assert not own.finished_since(0.0)
    (tmp_path / "x.lock").write_text("?")
    with turn(tmp_path / "x.lock") as own:
        assert not own.finished_since(0.0)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(turns_module, "fcntl", SimpleNamespace(flock=without, LOCK_EX=0, LOCK_NB=0))
    with pytest.raises(EnvironmentFault, match=r"cannot lock .*\n.*no locks"), turn(tmp_path / "x.lock"):
        pass


def test_optional_sources_may_be_absent(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    plain = prepare(settings(tmp_path, bundle), root=tmp_path)
    books, more = (SourceConfig(path=path, optional=True) for path in ("books.jsonl", "more/*.txt"))
    without = prepare(settings(tmp_path, bundle, train=("corpus.jsonl", books, more)), root=tmp_path)
    assert (without.store_dir, without.absent) == (plain.store_dir, ("books.jsonl", "more/*.txt"))
    write_corpus(tmp_path / "books.jsonl", TEXTS[:20])
    present = prepare(settings(tmp_path, bundle, train=("corpus.jsonl", books, more)), root=tmp_path)
    assert present.absent == ("more/*.txt",)
    assert len(documents(present, "train")) > len(documents(plain, "train"))
    with pytest.raises(DataError, match=r"every source is absent\n.*more/\*\.txt"):
        prepare(settings(tmp_path, bundle, train=(more,)), root=tmp_path)
    needed = SourceConfig(path="gone.jsonl", name="x")
    with pytest.raises(DataError, match=r"gone\.jsonl is missing"):
        prepare(settings(tmp_path, bundle, train=("corpus.jsonl", needed)), root=tmp_path)


def test_the_sources_of_a_mix_are_streams_of_their_own(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS[:200])
    write_corpus(tmp_path / "b.jsonl", TEXTS[200:])
    mixed = (SourceConfig(path="corpus.jsonl", weight=1), SourceConfig(path="b.jsonl", name="b", weight=2))
    config = settings(tmp_path, bundle, train=mixed).model_copy(update={"train": TrainConfig(seq_len=64)})
    prepared = prepare(config, root=tmp_path)
    plain = prepare(settings(tmp_path, bundle, train=("corpus.jsonl", "b.jsonl")), root=tmp_path)
    assert plain.store_dir != prepared.store_dir
    assert documents(prepared, "train") == documents(plain, "train")
    assert documents(prepared, "val") == documents(plain, "val")
    first, second = TokenStore.open(prepared.store_dir).streams()
    (whole,) = TokenStore.open(plain.store_dir).streams()
    split = TokenStore.open(prepared.store_dir).split("train")
    assert (first.name, second.name, split.num_tokens) == ("corpus.jsonl", "b", whole.num_tokens)
    joined = [*first.tokens(0, first.num_tokens).tolist(), *second.tokens(0, second.num_tokens).tolist()]
    assert joined == whole.tokens(0, whole.num_tokens).tolist()
    assert prepared.rows_per_epoch(64) == first.num_tokens // 64 + second.num_tokens // 64
    assert json.loads(json.dumps(prepared.to_json()))["mix"] == [
        {"name": "corpus.jsonl", "share": 1 / 3},
        {"name": "b", "share": 2 / 3},
    ]
    twice = (SourceConfig(path="*.jsonl", weight=1), SourceConfig(path="b.jsonl", weight=2))
    with pytest.raises(DataError, match=r"b\.jsonl is named twice\nby '\*\.jsonl' and by 'b\.jsonl'"):
        prepare(settings(tmp_path, bundle, train=twice), root=tmp_path)
    short = config.model_copy(update={"train": TrainConfig(seq_len=9000)})
    with pytest.raises(DataError, match=r"the source b has \d+ tokens, fewer than one row of 9000"):
        prepare(short, root=tmp_path)


def test_duplicates_are_left_out_when_asked(tmp_path: Path, bundle: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", TEXTS[:60] + TEXTS[30:90])
    write_corpus(tmp_path / "b.jsonl", TEXTS[80:100])
    both = ("corpus.jsonl", "b.jsonl")
    every = prepare(settings(tmp_path, bundle, train=both), root=tmp_path)
    once = prepare(settings(tmp_path, bundle, train=both, dedup=True), root=tmp_path)
    held_out = set(documents(every, "val"))
    assert held_out
    assert documents(once, "train") == [text for text in TEXTS[:100] if text not in held_out]
    assert documents(once, "val") == documents(every, "val")
    removed = len(documents(every, "train")) - len(documents(once, "train"))
    assert (every.manifest.duplicates, once.manifest.duplicates) == (0, removed)
    assert f"{removed} duplicates left out" in once.summary
    mixed = (SourceConfig(path="corpus.jsonl", weight=1), SourceConfig(path="b.jsonl", weight=1))
    streams = TokenStore.open(
        prepare(settings(tmp_path, bundle, train=mixed, dedup=True), root=tmp_path).store_dir
    ).streams()
    kept_in_second = [text for text in TEXTS[90:100] if text not in held_out]
    assert streams[1].num_documents == len(kept_in_second)
