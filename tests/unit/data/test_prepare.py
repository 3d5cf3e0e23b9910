"""Preparation: the right tokens in the right split, made once, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from trainway.config.schema import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from trainway.data import prepare as module
from trainway.data import store as store_module
from trainway.data import tokenise as tokenise_module
from trainway.data.prepare import PreparedData, prepare
from trainway.data.store import TokenStore
from trainway.data.tokenizer import load_tokenizer, train_tokenizer
from trainway.errors import ConfigError, DataError, EnvironmentFault

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
    sources = module.find_sources(config.data.train, config.data, setting="x", root=tmp_path)
    texts = list(module._sample(sources, config.data, module._Split(RunConfig()), 600_000, []))
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
    left = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert left == [".jsonl", ".lock"]


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
    cache = tmp_path / "cache"
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_truncated_gzip_file_leaves_nothing(tmp_path: Path, corpus: Path, bundle: Path) -> None:
    import gzip

    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes())[:-500])
    with pytest.raises(DataError, match=r"z\.jsonl\.gz: truncated or corrupt"):
        prepare(settings(tmp_path, bundle, train=("corpus.jsonl", "z.jsonl.gz")), root=tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


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
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
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
