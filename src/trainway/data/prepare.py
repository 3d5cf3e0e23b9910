"""From sources to a token store: reads, checks, splits and tokenises documents, once for the same content."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import DataConfig, RunConfig
from trainway.data.sources import BadRecord, Document, Source, find_sources, read_documents
from trainway.data.store import (
    FORMAT_VERSION,
    QUARANTINE,
    TOKENIZER_DIR,
    StoreManifest,
    StoreWriter,
    TokenStore,
)
from trainway.data.tokenise import has_bos, tokenise
from trainway.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_hash,
    train_tokenizer,
    vocab_size,
)
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_directory, atomic_write, disk_faults, hash_file

BAD_RECORDS = "bad-records.jsonl"
LISTED_RECORDS = 20

Progress = Callable[[str, int, int], None]
"""Called with (label, bytes done, bytes in all)."""


@dataclass(frozen=True)
class PreparedData:
    """A verified token store. The name of `store_dir` is the hash of all that it was made from."""

    store_dir: Path
    tokenizer_dir: Path
    manifest: StoreManifest
    summary: str
    cached: bool


def prepare(config: RunConfig, *, progress: Progress | None = None, root: Path | None = None) -> PreparedData:
    """Make the token store of `config.data`, or find the one made before from the same content; verify it.

    Relative paths are below `root` (the working directory). Safe to call from several processes at once.
    Raises DataError for missing, altered or malformed data (only the list of bad records is kept then),
    ConfigError for settings that contradict each other, EnvironmentFault when the disk is full or read-only.
    """
    root = root or Path.cwd()
    report = progress or (lambda label, done, total: None)
    _check_settings(config)
    tokenizer = (
        load_tokenizer(root / Path(config.tokenizer.path).expanduser()) if config.tokenizer.path else None
    )
    if tokenizer is not None:
        _check_vocab_size(config, vocab_size(tokenizer))
    train = find_sources(config.data.train, config.data, setting="data.train", root=root)
    validation = find_sources(config.data.validation, config.data, setting="data.validation", root=root)
    sources = _hashed({"train": train, "validation": validation}, report)
    cache = root / Path(config.data.store_dir).expanduser()
    store_dir = cache / _content_key(config, sources, tokenizer)
    with _locked(store_dir, report):
        cached = store_dir.exists()
        if not cached:
            for stale in cache.glob(f"{store_dir.name}.tmp-*"):  # of a killed process: the lock is ours
                shutil.rmtree(stale, ignore_errors=True)
            with atomic_directory(store_dir) as temp:
                _build(temp, cache, config, sources, tokenizer, report)
    # Outside the lock, so that processes verify at the same time.
    store = TokenStore.open(store_dir)
    _check_vocab_size(config, store.manifest.vocab_size)
    return PreparedData(store_dir, store.tokenizer_dir, store.manifest, _summary(store.manifest), cached)


def _check_settings(config: RunConfig) -> None:
    data = config.data
    if not data.train:
        raise ConfigError(
            "data.train names no source", fix="name files, directories or patterns: data.train=[...]"
        )
    if not data.validation and data.val_ratio in (0, 1):
        left = "validation" if data.val_ratio == 0 else "training"
        raise ConfigError(
            f"data.val_ratio {data.val_ratio:g} leaves no {left} document",
            fix="set data.val_ratio to about 0.01, or name validation sources: data.validation=[...]",
        )
    if not config.tokenizer.path:
        _check_vocab_size(config, config.tokenizer.vocab_size)


def _check_vocab_size(config: RunConfig, tokenizer_size: int) -> None:
    rows = config.model.vocab_size
    if rows is not None and rows < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size {rows} is smaller than the tokenizer's vocabulary of {tokenizer_size}",
            "the embedding needs a row for each token",
            f"leave model.vocab_size empty, or set tokenizer.vocab_size to {rows} at most",
        )


def _hashed(sources: dict[str, list[Source]], report: Progress) -> dict[str, list[Source]]:
    total = sum(source.size for group in sources.values() for source in group)
    done = 0

    def hashed(source: Source) -> Source:
        return source if source.hash else replace(source, hash=hash_file(source.path))

    result: dict[str, list[Source]] = {}
    with ThreadPoolExecutor() as threads:
        for setting, group in sources.items():
            result[setting] = []
            for source in threads.map(hashed, group):
                result[setting].append(source)
                done += source.size
                report("hashing sources", done, total)
    return result


def _content_key(
    config: RunConfig, sources: dict[str, list[Source]], tokenizer: PreTrainedTokenizerFast | None
) -> str:
    """32 hex digits that differ whenever the store would: paths and the number of cores do not count."""
    data = config.data
    learnt = config.tokenizer.model_dump(mode="json", exclude={"path"})
    content = {
        "format": FORMAT_VERSION,
        "sources": {
            setting: [[source.kind, source.text_unit, source.size, source.hash] for source in group]
            for setting, group in sources.items()
        },
        "tokenizer": learnt if tokenizer is None else [tokenizer_hash(tokenizer), tokenizer.chat_template],
        "text_field": data.text_field,
        "max_document_mib": data.max_document_mib,
        "on_bad_record": data.on_bad_record,
        "split": None if data.validation else [data.val_ratio, config.seed],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


@contextmanager
def _locked(store_dir: Path, report: Progress) -> Iterator[None]:
    """Hold the lock of one store. The file stays: removing it would let two processes hold a lock each."""
    path = store_dir.with_name(f"{store_dir.name}.lock")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 - closed below, where the lock ends
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares the same data", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    out: Path,
    cache: Path,
    config: RunConfig,
    sources: dict[str, list[Source]],
    tokenizer: PreTrainedTokenizerFast | None,
    report: Progress,
) -> StoreManifest:
    is_validation = _Split(config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, out / TOKENIZER_DIR)
    else:
        _learn_tokenizer(out, cache, config, sources, is_validation, report)
    tokenizer = load_tokenizer(out / TOKENIZER_DIR)  # as every later reader sees it
    _check_vocab_size(config, vocab_size(tokenizer))
    bad: list[BadRecord] = []
    total = sum(source.size for group in sources.values() for source in group)
    texts = _split_texts(
        sources, config.data, is_validation, bad, lambda done: report("tokenising", done, total)
    )
    with StoreWriter(out, vocab_size(tokenizer)) as writer:
        tokenise(texts, tokenizer, writer)
        if bad and config.data.on_bad_record == "error":
            raise _bad_records_error(bad, cache)
        _check_documents(config, writer)
        if bad:
            atomic_write(out / QUARANTINE, _json_lines(bad))
        bos_id = tokenizer.bos_token_id if has_bos(tokenizer) else None
        return writer.finish(
            token_bytes(tokenizer),
            tokenizer_hash=tokenizer_hash(tokenizer),
            bos_id=bos_id,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            sources={
                setting: [{"path": str(s.path), "size": s.size, "hash": s.hash} for s in group]
                for setting, group in sources.items()
            },
            quarantined=len(bad),
        )


class _Split:
    """Decides by its text alone whether a training document is held out: duplicates stay on one side."""

    def __init__(self, config: RunConfig) -> None:
        self._seed = config.seed & (2**64 - 1)
        self._threshold = 0 if config.data.validation else int(config.data.val_ratio * 2**64)

    def __call__(self, text: bytes) -> bool:
        return self._threshold > 0 and xxhash.xxh3_64_intdigest(text, self._seed) < self._threshold


def _learn_tokenizer(
    out: Path,
    cache: Path,
    config: RunConfig,
    sources: dict[str, list[Source]],
    is_validation: _Split,
    report: Progress,
) -> None:
    bad: list[BadRecord] = []
    budget = config.tokenizer.sample_mib << 20
    texts = _sample(sources["train"], config.data, is_validation, budget, bad)
    train_tokenizer(
        texts,
        config.tokenizer,
        out / TOKENIZER_DIR,
        progress=lambda done, total, label: report(label, done, total),
        total=min(budget, sum(source.size for source in sources["train"])),
    )
    if bad and config.data.on_bad_record == "error":  # the sample may not have met them all
        everything: list[BadRecord] = []
        deque(_split_texts(sources, config.data, is_validation, everything, lambda done: None), maxlen=0)
        raise _bad_records_error(everything, cache)


def _sample(
    sources: list[Source], config: DataConfig, is_validation: _Split, budget: int, bad: list[BadRecord]
) -> Iterator[str]:
    """About `budget` bytes of training text: from each file its share, from its beginning on."""
    share = budget / max(1, sum(source.size for source in sources))
    taken, allowed = 0, 0.0
    for source in sources:
        # A file's size says little about its text when it is compressed: all of a small corpus is allowed.
        allowed = budget if share >= 1 else allowed + source.size * share
        if taken >= allowed:
            continue
        for document in _documents(source, config, bad):
            data = document.text.encode()
            if not is_validation(data):
                yield document.text
                taken += len(data)
                if taken >= allowed:
                    break


def _documents(source: Source, config: DataConfig, bad: list[BadRecord]) -> Iterator[Document]:
    """The documents of a source; its bad records go to `bad`, and end the stream where they are errors.

    The file is read to its end all the same, so that `bad` is complete.
    """
    for record in read_documents(source.path, config, text_unit=source.text_unit):
        if isinstance(record, BadRecord):
            bad.append(record)
        elif not bad or config.on_bad_record == "quarantine":
            yield record


def _split_texts(
    sources: dict[str, list[Source]],
    config: DataConfig,
    is_validation: _Split,
    bad: list[BadRecord],
    report: Callable[[int], None],
) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes of text) of every document, in the order of the sources."""
    before = 0
    for setting, group in sources.items():
        for source in group:
            read = 0
            for document in _documents(source, config, bad):
                data = document.text.encode()
                held_out = setting == "validation" or is_validation(data)
                yield ("val" if held_out else "train"), document.text, len(data)
                if (read + len(data)) >> 22 > read >> 22:
                    report(before + min(source.size, read))
                read += len(data)
            before += source.size
            report(before)


def _check_documents(config: RunConfig, writer: StoreWriter) -> None:
    if not writer.documents("train"):
        raise DataError(
            "there is no training document", fix="add sources to data.train, or lower data.val_ratio"
        )
    if not writer.documents("val"):
        count = writer.documents("train")
        raise DataError(
            "there is no validation document",
            f"data.val_ratio {config.data.val_ratio:g} held out none of {count} documents",
            "raise data.val_ratio, name validation sources (data.validation), or, for text files, cut them into "
            "more documents: data.text_unit=paragraph",
        )


def _bad_records_error(bad: list[BadRecord], cache: Path) -> DataError:
    path = cache / BAD_RECORDS
    atomic_write(path, _json_lines(bad))
    listed = [str(record) for record in bad[:LISTED_RECORDS]]
    if len(bad) > LISTED_RECORDS:
        listed.append(f"and {len(bad) - LISTED_RECORDS} more")
    return DataError(
        f"{len(bad)} malformed record{'s' if len(bad) > 1 else ''} in the data",
        "\n".join(listed),
        f"correct them ({path} lists all), or set data.on_bad_record=quarantine to leave them out",
    )


def _json_lines(bad: list[BadRecord]) -> str:
    return "".join(json.dumps({**asdict(record), "source": str(record.source)}) + "\n" for record in bad)


def _summary(manifest: StoreManifest) -> str:
    train, val = manifest.splits["train"], manifest.splits["val"]
    text = (
        f"{train['documents']:,} documents, {train['tokens']:,} tokens for training; "
        f"{val['documents']:,} documents, {val['tokens']:,} tokens for validation; "
        f"{train['text_bytes'] / max(1, train['tokens'] - 2 * train['documents']):.2f} bytes per token"
    )
    return text + (f"; {manifest.quarantined:,} malformed records set aside" if manifest.quarantined else "")
