"""Sources on the Hub: a dataset is exported once into the cache as JSON lines, and is a file from then on."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainway.config.mixes import train_sources
from trainway.config.schema import DataConfig, SourceConfig
from trainway.data.rows import file_kind
from trainway.data.turns import Progress, turn
from trainway.errors import DataError
from trainway.files import atomic_directory, atomic_write, read_json
from trainway.logs import stage

HUB_DIR = ".hub"
ROWS = "rows.jsonl"
SET_ASIDE = "malformed.jsonl"
ORIGIN = "origin.json"
LISTED = 20

_HUB_SOURCE = re.compile(
    r"(?P<scheme>hf://(?:datasets/)?)?(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>.+)\])?"
)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hub, a commit, tag or branch of it (None: the newest), and the split or slices that are read."""

    name: str
    revision: str | None
    split: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{at}[{self.split}]"


def hub_source(path: str, root: Path) -> HubSource | None:
    """What a source's path names on the Hub: `hf://OWNER/NAME`, or OWNER/NAME where there is no such file.

    Either may end with `@REVISION` and `[SPLIT]`, as in `OWNER/NAME[train[:1%]]`. None: it is a local path.
    """
    match = _HUB_SOURCE.fullmatch(path)
    if match is None:
        return None
    if match["scheme"] is None:
        local = root / Path(match["name"])
        is_file = file_kind(Path(match["name"])) is not None
        # Below a directory of that name it is a misspelt file rather than a dataset.
        if is_file or local.exists() or local.parent.is_dir() or _matches(path, root):
            return None
    return HubSource(match["name"], match["revision"], match["split"] or "train")


def with_local_sources(data: DataConfig, root: Path, cache: Path, report: Progress) -> DataConfig:
    """`data` with a file in the cache in place of each dataset of the Hub; a file that is there already is taken.

    Raises DataError for malformed rows, where they are errors, and for whatever `export` raises them for;
    EnvironmentFault when a dataset is not in the cache and the Hub cannot be reached.
    """

    def local(path: str) -> str | None:
        source = hub_source(path, root)
        return None if source is None else str(_fetched(source, data, cache, report))

    train: list[str | SourceConfig] = []
    for source in train_sources(data):
        path = local(source.path)
        named = {"path": path, "name": source.name or source.path}
        train.append(source if path is None else source.model_copy(update=named))
    validation = tuple(local(path) or path for path in data.validation)
    return data.model_copy(update={"train": tuple(train), "validation": validation})


def _matches(path: str, root: Path) -> bool:
    return glob.has_magic(path) and any(glob.iglob(str(root / path), recursive=True))


def _fetched(source: HubSource, data: DataConfig, cache: Path, report: Progress) -> Path:
    name = xxhash.xxh3_64_hexdigest(str(source).encode())
    folder = cache / HUB_DIR / f"{source.name.replace('/', '--')}-{name}"
    with turn(folder.with_name(f"{folder.name}.lock"), report):
        if not folder.exists():
            with atomic_directory(folder) as temp:
                _export(source, data, temp, report)
    origin = read_json(folder / ORIGIN)
    revision = origin.get("revision") or "the newest in the cache of the Hub"
    stage("DATA", f"{source}: {origin['rows']:,} rows of {revision}, kept in {folder}")
    if origin["malformed"] and data.on_bad_record == "error":
        raise _malformed(source, folder / SET_ASIDE, origin["malformed"])
    return folder / ROWS


def _export(source: HubSource, data: DataConfig, out: Path, report: Progress) -> None:
    from trainway.data.export import export
    from trainway.data.hub import stream_rows

    origin = stream_rows(source.name, split=source.split, revision=source.revision).source()
    done = export(
        source.name,
        out / ROWS,
        split=source.split,
        # the commit that was just found: a later one may differ
        revision=origin.get("revision", source.revision),
        quarantine=out / SET_ASIDE,
        config=data,
        progress=report,
    )
    facts = {**origin, "split": source.split, "rows": done.rows, "malformed": done.bad}
    atomic_write(out / ORIGIN, json.dumps(facts, indent=1) + "\n")


def _malformed(source: HubSource, listing: Path, count: int) -> DataError:
    lines = listing.read_text(encoding="utf-8").splitlines()
    named: Sequence[str] = [_described(json.loads(line)) for line in lines[:LISTED]]
    more = [f"and {count - LISTED} more"] if count > LISTED else []
    return DataError(
        f"{count} malformed row{'s' if count > 1 else ''} in the dataset {source}",
        "\n".join([*named, *more]),
        f"set data.on_bad_record=quarantine to leave them out ({listing} lists all), or name another split",
    )


def _described(entry: dict[str, str]) -> str:
    field = f"field {entry['field']!r}: " if entry["field"] else ""
    return f"row {entry['line']}: {field}{entry['reason']}"
