"""What a token store is made from: the files of each source, found and hashed once for all who ask together.

Reading a corpus to hash it costs as much as the network volume that holds it is slow, so it is done rarely, and
never on trust that matters:
- Processes that start together (the ranks of a run, the workers of a preparation) take turns; who waited while
  another one searched, checked and hashed takes its result. A later start does the work anew.
- A plain file's hash is remembered, and computed again when the file has changed (`hash_memory`).
- Shards with a manifest are never remembered: their bytes are read and compared on each start.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from trainway.config.mixes import is_mix, train_sources
from trainway.config.schema import DataConfig, SourceConfig
from trainway.data.hash_memory import remembered_hashes
from trainway.data.remote_sources import with_fetched_sources
from trainway.data.sources import Source, find_sources
from trainway.data.store import stream_key
from trainway.data.turns import Progress, turn
from trainway.errors import DataError
from trainway.files import atomic_write, read_json

SOURCES_DIR = ".sources"
HASHES = "hashes.json"


@dataclass(frozen=True)
class InputFile:
    """One file of documents; `split` is what a StoreWriter calls the stream that its documents are of."""

    source: Source
    setting: Literal["train", "validation"]
    split: str


@dataclass(frozen=True)
class Inputs:
    """Every file in the order in which its documents are stored, each with its hash."""

    files: tuple[InputFile, ...]
    present: tuple[int, ...]
    """Places in data.train of the sources that are there: an optional one may be absent."""

    def of(self, setting: str) -> list[Source]:
        """The files of data.train or data.validation."""
        return [file.source for file in self.files if file.setting == setting]

    def per_stream(self) -> list[int]:
        """How many files each source of a mix has; empty without a mix."""
        counts: dict[str, int] = {}
        for file in self.files:
            if file.setting == "train" and file.split != "train":
                counts[file.split] = counts.get(file.split, 0) + 1
        return list(counts.values())


def find_inputs(data: DataConfig, root: Path, cache: Path, report: Progress, began: float) -> Inputs:
    """The files that data.train and data.validation name, relative to `root`; `began`: when this process did.

    Raises DataError for whatever is missing, empty, altered, named twice or of an unknown kind.
    """
    asked = [data.model_dump(mode="json", exclude={"store_dir", "prefetch_steps"}), str(root.absolute())]
    name = xxhash.xxh3_64_hexdigest(json.dumps(asked, sort_keys=True).encode())
    folder = cache / SOURCES_DIR
    record = folder / f"{name}.json"
    with turn(folder / f"{name}.lock", report) as own:
        if own.finished_since(began) and record.exists():
            return _from_json(read_json(record))
        found = _find(data, root)
        hashes = iter(_hashed([file.source for file in found.files], folder / HASHES, report))
        inputs = replace(found, files=tuple(replace(file, source=next(hashes)) for file in found.files))
        atomic_write(record, json.dumps(_to_json(inputs)))
        own.finish()
    return inputs


def present_sources(data: DataConfig, inputs: Inputs) -> tuple[SourceConfig, ...]:
    """The entries of data.train that are there."""
    sources = train_sources(data)
    return tuple(sources[place] for place in inputs.present)


def training_sources(data: DataConfig, root: Path | None = None) -> list[Source]:
    """The files that data.train names, fetched where they are in object storage, not hashed.

    Raises DataError as find_inputs does.
    """
    root = root or Path.cwd()
    cache = root / Path(data.store_dir).expanduser()
    data = with_fetched_sources(data, cache, lambda label, done, total: None)
    return [file.source for file in _find_training(data, _present(data, root), root)]


def _find(data: DataConfig, root: Path) -> Inputs:
    present = _present(data, root)
    files = _find_training(data, present, root)
    held_out = find_sources(data.validation, data, setting="data.validation", root=root)
    files += [InputFile(source, "validation", "val") for source in held_out]
    return Inputs(tuple(files), present)


def _find_training(data: DataConfig, present: Sequence[int], root: Path) -> list[InputFile]:
    paths = [train_sources(data)[place].path for place in present]
    if not is_mix(data):
        found = find_sources(paths, data, setting="data.train", root=root)
        return [InputFile(source, "train", "train") for source in found]
    files: list[InputFile] = []
    for number, path in enumerate(paths):
        found = find_sources([path], data, setting="data.train", root=root)
        files += [InputFile(source, "train", stream_key(number)) for source in found]
    _refuse_overlap(files, paths)
    return files


def _present(data: DataConfig, root: Path) -> tuple[int, ...]:
    sources = train_sources(data)
    present = tuple(place for place, source in enumerate(sources) if not _is_absent(source, root))
    if not present and sources:
        raise DataError(
            "data.train: every source is absent",
            "all are optional, and none is there: " + ", ".join(source.path for source in sources),
            "correct the paths, or add a source",
        )
    return present


def _is_absent(source: SourceConfig, root: Path) -> bool:
    path = root / Path(source.path).expanduser()
    if not source.optional or path.exists():
        return False
    return not (glob.has_magic(source.path) and any(glob.iglob(str(path), recursive=True)))


def _refuse_overlap(files: Iterable[InputFile], paths: list[str]) -> None:
    seen: dict[Path, str] = {}
    for file in files:
        pattern = paths[int(file.split.rpartition(".")[2])]
        key = file.source.path.resolve()
        if key in seen:
            raise DataError(
                f"data.train: {file.source.path} is named twice",
                f"by {seen[key]!r} and by {pattern!r}",
                "name each file once: what it is trained on is for one weight to say",
            )
        seen[key] = pattern


def _hashed(sources: list[Source], memory: Path, report: Progress) -> list[Source]:
    total = sum(source.size for source in sources)
    # of a shard the bytes were just compared with its manifest
    plain = [source for source in sources if not source.hash]
    done = total - sum(source.size for source in plain)

    def hashed(size: int) -> None:
        nonlocal done
        done += size
        report("hashing sources", done, total)

    hashes = iter(remembered_hashes([source.path for source in plain], memory, hashed))
    return [source if source.hash else replace(source, hash=next(hashes)) for source in sources]


def _to_json(inputs: Inputs) -> dict[str, Any]:
    files = [
        {
            "source": {**asdict(file.source), "path": str(file.source.path)},
            "setting": file.setting,
            "split": file.split,
        }
        for file in inputs.files
    ]
    return {"files": files, "present": inputs.present}


def _from_json(content: dict[str, Any]) -> Inputs:
    files = [
        InputFile(
            Source(**{**file["source"], "path": Path(file["source"]["path"])}), file["setting"], file["split"]
        )
        for file in content["files"]
    ]
    return Inputs(tuple(files), tuple(content["present"]))
