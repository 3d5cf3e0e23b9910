"""Preparation spread over workers: each tokenises a range of the files, and the parts are joined to one store.

A part is a small token store with a `part.json` beside its manifest, so that every byte of it can be verified.
Files are the unit of work: the parts are contiguous ranges of the ordered files with the least largest part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from trainway.data.building import (
    Job,
    LeftOut,
    check_documents,
    clear_stale,
    finish_store,
    open_writer,
    write_documents,
    write_tokenizer,
)
from trainway.data.inputs import InputFile
from trainway.data.store import LEFT_OUT, QUARANTINE, TOKENIZER_DIR, TokenSplit, TokenStore, stream_number
from trainway.data.tokenizer import load_tokenizer
from trainway.data.turns import turn
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_directory, read_json

PART_FILE = "part.json"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in each pod of an Indexed Job."""


@dataclass(frozen=True)
class PreparedPart:
    """A verified part, or the finished store when that exists already."""

    store_dir: Path
    """The part's directory."""
    worker_index: int
    num_workers: int
    summary: str
    cached: bool
    absent: tuple[str, ...]
    """Names of the optional sources that are not there."""
    warnings: tuple[str, ...] = ()
    """What the user should know of the tokenizer and its chat template."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**asdict(self), "store_dir": str(self.store_dir)}


def split_files(sizes: Sequence[int], num_parts: int) -> list[range]:
    """Contiguous ranges, none empty, whose largest sum of sizes is the least possible.

    Raises ConfigError when there are fewer files than parts.
    """
    if not 1 <= num_parts <= len(sizes):
        raise ConfigError(
            f"the data is {len(sizes)} files, too few for {num_parts} workers",
            "a file is prepared by one worker as a whole",
            f"use at most {len(sizes)} workers, or cut the data into more files: trainway data shard",
        )
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle, num_parts)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    starts = [*_filled(sizes, low, num_parts), len(sizes)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def resolve_index(worker_index: int | Literal["auto"], num_workers: int, environ: Mapping[str, str]) -> int:
    """The worker's number from 0. Raises ConfigError when it is out of range, or not in the environment."""
    if worker_index == "auto":
        text = environ.get(INDEX_VARIABLE, "")
        if not text.isdecimal():
            found = f"{INDEX_VARIABLE} is {text!r}" if text else f"{INDEX_VARIABLE} is not set"
            raise ConfigError(
                "--worker-index auto finds no index",
                f"{found}; Kubernetes sets it in the pods of an Indexed Job",
                "give the number: --worker-index 0",
            )
        worker_index = int(text)
    if num_workers < 1 or not 0 <= worker_index < num_workers:
        raise ConfigError(
            f"--worker-index {worker_index} is not one of {num_workers} workers",
            "the workers are numbered from 0",
            f"use an index from 0 to {max(num_workers, 1) - 1}, or more workers",
        )
    return worker_index


def prepare_part(job: Job, num_workers: int, worker_index: int | Literal["auto"]) -> PreparedPart:
    """Make and verify the part of one worker, or find it made. Safe to call twice at the same time."""
    index = resolve_index(worker_index, num_workers, os.environ)
    _refuse_dedup(job, num_workers)
    files = _files_of(job, num_workers, index)
    folder = parts_dir(job)
    path = folder / _part_name(index, num_workers)
    with turn(folder / f"{path.name}.lock", job.report):
        if job.store_dir.exists():
            return PreparedPart(
                job.store_dir, index, num_workers, "the store is made already", True, job.absent
            )
        cached = path.exists()
        if not cached:
            clear_stale(path)
            shared = _shared_tokenizer(job, folder)
            with atomic_directory(path) as temp:
                _write_part(job, temp, files, shared, index, num_workers)
        store = _open_part(job, num_workers, index)
    train, val = store.manifest.splits["train"], store.manifest.splits["val"]
    text = (
        f"part {index} of {num_workers}: {len(files)} files, "
        f"{train['documents'] + val['documents']:,} documents, {train['tokens'] + val['tokens']:,} tokens"
    )
    warnings = tuple(job.encoder.warnings) if job.encoder else ()
    return PreparedPart(path, index, num_workers, text, cached, job.absent, warnings)


def all_made(job: Job, num_workers: int) -> bool:
    """Whether every part is there, and the store is not yet.

    Of workers that finish at once the last to have renamed its part sees those of all.
    """
    folder = parts_dir(job)
    names = (_part_name(index, num_workers) for index in range(num_workers))
    return not job.store_dir.exists() and all((folder / name).is_dir() for name in names)


def merge_job(job: Job, num_workers: int) -> None:
    """Make the job's store, whose lock is ours, of the parts; remove them.

    Raises DataError naming the part that is missing, damaged or made from something else.
    """
    split_files([file.source.size for file in job.inputs.files], num_workers)
    _refuse_dedup(job, num_workers)
    _refuse_missing(job, num_workers)
    parts = [_open_part(job, num_workers, index) for index in range(num_workers)]
    for index, part in enumerate(parts):
        if _tokenizer_files(part) != _tokenizer_files(parts[0]):
            raise DataError(
                f"{part.tokenizer_dir} is another tokenizer than that of part 0",
                "the same tokens would mean something else",
                _cure(part.path, index, num_workers),
            )
    tokenizer = load_tokenizer(parts[0].tokenizer_dir)
    with atomic_directory(job.store_dir) as out:
        shutil.copytree(parts[0].tokenizer_dir, out / TOKENIZER_DIR)
        with open_writer(job, out, tokenizer) as writer:
            total = sum(part.manifest.splits[name]["tokens"] for part in parts for name in ("train", "val"))
            done = 0
            for name in writer.splits():
                for part in parts:
                    stream, text_bytes = _stream(part, name)
                    for tokens, lengths, mask in stream.documents():
                        writer.append(name, tokens, lengths, 0, mask)
                        done += len(tokens)
                        job.report("merging", done, total)
                    writer.append(name, _NOTHING, _NOTHING, text_bytes, _NOTHING if job.encoder else None)
            check_documents(job, writer)
            for listing in (QUARANTINE, LEFT_OUT):
                listed = b"".join(
                    (part.path / listing).read_bytes() for part in parts if (part.path / listing).exists()
                )
                if listed:
                    (out / listing).write_bytes(listed)
            left_out = _left_out(parts)
            finish_store(job, writer, tokenizer, job.inputs.files, left_out)
    for part in parts:
        shutil.rmtree(part.path, ignore_errors=True)


def parts_dir(job: Job) -> Path:
    """Where the parts of a store are gathered, beside the store."""
    return job.store_dir.with_name(f"{job.store_dir.name}.parts")


_NOTHING = np.empty(0, dtype=np.int64)


def _filled(sizes: Sequence[int], capacity: int, num_parts: int) -> list[int]:
    """Where parts of at most `capacity` begin, filled in order; at least num_parts when there are enough files."""
    starts, load = [0], 0
    for place, size in enumerate(sizes):
        # The files left may be just enough to give each remaining part one.
        needed = len(sizes) - place == num_parts - len(starts)
        if place and (load + size > capacity or needed):
            starts.append(place)
            load = 0
        load += size
    return starts


def _part_name(index: int, num_workers: int) -> str:
    return f"part-{index}-of-{num_workers}"


def _files_of(job: Job, num_workers: int, index: int) -> list[InputFile]:
    ranges = split_files([file.source.size for file in job.inputs.files], num_workers)
    return [job.inputs.files[place] for place in ranges[index]]


def _shared_tokenizer(job: Job, folder: Path) -> Path | None:
    """The tokenizer that the first worker trained, for all; None when there is one to reuse."""
    if job.given is not None:
        return None
    path = folder / TOKENIZER_DIR
    with turn(folder / f"{TOKENIZER_DIR}.lock", job.report):
        if not path.exists():
            clear_stale(path)
            with atomic_directory(path) as temp:
                write_tokenizer(job, temp)
    return path


def _write_part(
    job: Job, out: Path, files: Sequence[InputFile], shared: Path | None, index: int, num_workers: int
) -> None:
    tokenizer: PreTrainedTokenizerFast
    if shared is None:
        tokenizer = write_tokenizer(job, out / TOKENIZER_DIR)
    else:
        shutil.copytree(shared, out / TOKENIZER_DIR)
        tokenizer = load_tokenizer(out / TOKENIZER_DIR)
    with open_writer(job, out, tokenizer) as writer:
        left_out = write_documents(job, files, tokenizer, writer, f"-{index}-of-{num_workers}")
        description = {
            "index": index,
            "num_workers": num_workers,
            "content": job.content,
            "files": _named(files),
        }
        (out / PART_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        finish_store(job, writer, tokenizer, files, left_out)


def _left_out(parts: Sequence[TokenStore]) -> LeftOut:
    """What all parts left out together."""
    sums: dict[str, int] = {}
    for part in parts:
        manifest = part.manifest
        found = {"quarantined": manifest.quarantined, "duplicates": manifest.duplicates}
        found.update(manifest.conversations or {})
        for name, count in found.items():
            sums[name] = sums.get(name, 0) + count
    sums.pop("max_tokens", None)
    return LeftOut(**sums)


def _named(files: Sequence[InputFile]) -> list[list[Any]]:
    return [[str(file.source.path), file.source.hash] for file in files]


def _refuse_dedup(job: Job, num_workers: int) -> None:
    if job.config.data.dedup and num_workers > 1:
        raise ConfigError(
            f"data.dedup cannot be spread over {num_workers} workers",
            "a worker sees its own files alone: the copy of a document in another's would stay",
            "prepare without workers, or set data.dedup=false",
        )


def _refuse_missing(job: Job, num_workers: int) -> None:
    folder = parts_dir(job)
    missing = [
        index for index in range(num_workers) if not (folder / _part_name(index, num_workers)).is_dir()
    ]
    if not missing:
        return
    index = missing[0]
    name = _part_name(index, num_workers)
    others = f"; so are the parts of workers {', '.join(map(str, missing[1:]))}" if missing[1:] else ""
    why = f"worker {index} has not made it{others}"
    if other := _part_of_other_content(job, name):
        why += "\n" + "\n".join(other)
    raise DataError(f"{folder / name}: the part is missing", why, _command(index, num_workers))


def _part_of_other_content(job: Job, name: str) -> list[str]:
    """What differs in the newest part of this name that was made from something else."""
    found = sorted(job.cache.glob(f"*.parts/{name}/{PART_FILE}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        description = _description(path)
        if description is not None:
            difference = content_difference(description["content"], job.content)
            return [f"{path.parent} was made from something else:", *(f"  {line}" for line in difference)]
    return []


def _open_part(job: Job, num_workers: int, index: int) -> TokenStore:
    """A part with every byte verified, made from the job's content and of the right files."""
    path = parts_dir(job) / _part_name(index, num_workers)
    cure = _cure(path, index, num_workers)
    try:
        store = TokenStore.open(path)
    except DataError as error:
        raise DataError(error.what, error.why, cure) from error
    description = _description(path / PART_FILE)
    if description is None:
        raise DataError(f"{path / PART_FILE}: altered, or of another version", fix=cure)
    if difference := content_difference(description["content"], job.content):
        raise DataError(f"{path} was made from other data or settings", "\n".join(difference), cure)
    expected = [digest for _, digest in _named(_files_of(job, num_workers, index))]
    if (description["index"], description["num_workers"]) != (index, num_workers) or [
        digest for _, digest in description["files"]
    ] != expected:
        raise DataError(f"{path} holds other files than worker {index} of {num_workers} prepares", fix=cure)
    return store


def _tokenizer_files(store: TokenStore) -> dict[str, Any]:
    return {
        name: entry for name, entry in store.manifest.files.items() if name.startswith(f"{TOKENIZER_DIR}/")
    }


def _description(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except DataError:
        return None
    needed = {"index", "num_workers", "content", "files"}
    return content if isinstance(content, dict) and needed <= set(content) else None


def content_difference(old: Any, new: Any, where: str = "") -> list[str]:
    """One line `what: old -> new` for all in which two stores' contents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            line for key in keys for line in content_difference(old.get(key), new.get(key), f"{where}.{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and where.startswith(".sources."):
        pairs = enumerate(zip_longest(old, new))
        return [
            f"{where.rpartition('.')[2]} file {place}: {_file(a)} -> {_file(b)}"
            for place, (a, b) in pairs
            if a != b
        ]
    return [f"{where.removeprefix('.')}: {old} -> {new}"] if old != new else []


def _file(entry: list[Any] | None) -> str:
    return f"{entry[2]} bytes with hash {entry[3]}" if entry else "absent"


def _command(index: int, num_workers: int) -> str:
    return f"run: trainway prepare CONFIG --num-workers {num_workers} --worker-index {index}"


def _cure(path: Path, index: int, num_workers: int) -> str:
    return f"delete the directory {path}, then {_command(index, num_workers)}"


def _stream(part: TokenStore, name: str) -> tuple[TokenSplit, int]:
    """The part's documents of one of the store's splits, and their bytes of text."""
    number = stream_number(name)
    if number is None:
        split: Literal["train", "val"] = "val" if name == "val" else "train"
        return part.split(split), part.manifest.splits[split]["text_bytes"]
    return part.streams()[number], part.manifest.streams[number]["text_bytes"]
