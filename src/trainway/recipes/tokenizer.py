"""The tokenizer of an experiment: published, found on the volume, or trained on the shards; hashed file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainway.config.schema import DataConfig, RunConfig
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_directory, hash_file, read_json
from trainway.recipes.stages import Outcome, Progress
from trainway.recipes.volume import Volume

BUNDLE = "bundle.json"
"""In a tokenizer's directory: its files with their hashes, and what it was made from."""


def make_tokenizer(volume: Volume, given: str | None, config: RunConfig, report: Progress) -> Outcome:
    """Take the published tokenizer `given`, reuse the bundle on the volume, or train one on the training shards.

    Raises DataError when a file of the bundle was altered; ConfigError when another one is there already.
    """
    folder = volume.tokenizer
    if folder.is_dir() and any(folder.iterdir()):
        facts = _verified_bundle(folder)
        if given is not None:
            _check_same_tokenizer(folder, facts, given)
        if facts is None:
            from trainway.data.tokenizer import load_tokenizer, vocab_size

            size = vocab_size(load_tokenizer(folder))
            return Outcome("skipped", f"reused: {folder} holds one of {size:,} tokens")
        return Outcome(
            "skipped", f"complete and verified: {facts['vocab_size']:,} tokens, {facts['made_from']}"
        )
    from trainway.data import tokenizer as bpe

    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    if folder.is_dir():
        folder.rmdir()  # empty: what is made appears in one step
    with atomic_directory(folder) as temp:
        if given is not None:
            bpe.save_tokenizer(bpe.load_tokenizer(given), temp)
            source, made_from = _tokenizer_file(given), f"from {given}"
        else:
            budget = config.tokenizer.sample_mib << 20
            texts = _sample(volume, config.data, budget)
            bpe.train_tokenizer(
                texts, config.tokenizer, temp, progress=lambda d, t, label: report(label, d, t)
            )
            source, made_from = None, "trained on the shards"
        size = bpe.vocab_size(bpe.load_tokenizer(temp))
        files = {path.name: _entry(path) for path in sorted(temp.iterdir())}
        facts = {
            "vocab_size": size,
            "made_from": made_from,
            "source": source and hash_file(source),
            "files": files,
        }
        (temp / BUNDLE).write_text(json.dumps(facts, indent=1) + "\n")
    return Outcome("done", f"{size:,} tokens, {made_from}")


def _verified_bundle(folder: Path) -> dict[str, Any] | None:
    """What bundle.json says of the directory, its files hashed; None for a bundle that came from elsewhere."""
    path = folder / BUNDLE
    if not path.exists():
        return None
    facts = read_json(path)
    try:
        for name, entry in facts["files"].items():
            file = folder / name
            if not file.is_file():
                raise DataError(f"{file}: missing from the tokenizer", f"{path} lists it", _cure(folder))
            if _entry(file) != entry:
                raise DataError(
                    f"{file}: the tokenizer was altered", f"{path} has another hash", _cure(folder)
                )
        return {
            "vocab_size": int(facts["vocab_size"]),
            "made_from": facts["made_from"],
            "source": facts["source"],
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: altered", repr(error), _cure(folder)) from None


def _check_same_tokenizer(folder: Path, facts: dict[str, Any] | None, given: str) -> None:
    source = _tokenizer_file(given)
    if not source.is_file():
        raise ConfigError(f"--tokenizer-json: {source} is missing", "", "correct the path")
    if hash_file(source) not in (facts and facts["source"], hash_file(folder / "tokenizer.json")):
        raise ConfigError(
            f"{folder} holds another tokenizer than {given}",
            facts["made_from"] if facts else "it was put there by someone else",
            "choose another --experiment, move that directory away, or leave --tokenizer-json out",
        )


def _tokenizer_file(given: str) -> Path:
    path = Path(given).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "hash": hash_file(path)}


def _sample(volume: Volume, data: DataConfig, budget: int) -> Iterator[str]:
    """About `budget` bytes of training text: from each shard its share, from its beginning on."""
    from trainway.data.sources import Document, find_sources, read_documents

    sources = find_sources((str(volume.train_shards.absolute()),), data, setting="shards")
    share = budget / max(1, sum(source.size for source in sources))
    taken, allowed = 0, 0.0
    for source in sources:
        # a compressed file's size says little about its text: all of a small corpus is allowed
        allowed = budget if share >= 1 else allowed + source.size * share
        for record in read_documents(source.path, data, text_unit=source.text_unit):
            if taken >= allowed:
                break
            if isinstance(record, Document):
                yield record.text
                taken += len(record.text.encode())
            elif data.on_bad_record == "error":
                why = "a record of a shard is malformed"
                raise DataError(str(record), why, "correct it, or set data.on_bad_record=quarantine")


def _cure(folder: Path) -> str:
    return f"restore it, or move {folder} away: it is made again"
