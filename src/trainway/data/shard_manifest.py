"""The sharder's `manifest.json`: what a directory of shards holds, of what it was made, and where to go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainway.config.schema import ShardConfig
from trainway.data.shard_writer import Written, written_from_json, written_to_json
from trainway.data.shards import SHARD_MANIFEST
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_write, read_json

FORMAT = "trainway-shards-1"


@dataclass(frozen=True)
class Commit:
    """All that a resumed run needs: it is written, atomically, whenever a shard is complete."""

    train: Written
    validation: Written | None
    quarantine: dict[str, Any] | None
    """{"file", "records", "bytes", "hash"} of the records set aside, if there are any."""
    position: dict[str, Any] | None
    """Of the input; None before anything was read and after all of it was."""
    complete: bool

    @property
    def is_empty(self) -> bool:
        """Nothing was committed yet: the directory may be begun anew with other settings."""
        return self.position is None and not self.complete


def write_manifests(
    out: Path, val_out: Path | None, settings: dict[str, Any], source: dict[str, Any], commit: Commit
) -> None:
    """Write the manifest of each directory. The one of `out` alone is the commit, so it comes last."""
    shared = {"format": FORMAT, "complete": commit.complete}
    made_of = {"settings": settings, "source": source}
    train = {
        **shared,
        "part": "train",
        **made_of,
        "totals": commit.train.totals(),
        "quarantine": commit.quarantine,
        "resume": {
            "position": commit.position,
            "train": written_to_json(commit.train),
            "validation": commit.validation and written_to_json(commit.validation),
        },
    }
    written = [(out, train, commit.train.shards)]
    if val_out is not None and commit.validation is not None:
        head = {**shared, "part": "validation", **made_of, "totals": commit.validation.totals()}
        # the first time it is the other way round: it tells that both directories are ours
        written.insert(len(written) if commit.is_empty else 0, (val_out, head, commit.validation.shards))
    for folder, head, shards in written:
        _write(folder, head, shards)


def read_manifest(out: Path, val_out: Path | None) -> tuple[dict[str, Any], Commit] | None:
    """(the manifest of `out`, its commit), or None when there is none. Raises DataError for one that was altered."""
    path = out / SHARD_MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    try:
        if manifest["format"] != FORMAT or manifest["part"] != "train":
            raise DataError(
                f"{path} is not of a directory that the sharder could go on with",
                f"format {manifest['format']!r}, part {manifest['part']!r}",
                "choose another --out",
            )
        resume = manifest["resume"]
        validation = None
        if val_out is not None and resume["validation"] is not None:
            listed = _validation_shards(val_out, resume["validation"]["shards"])
            validation = written_from_json(resume["validation"], listed)
        train = written_from_json(resume["train"], manifest["shards"])
        position, complete = resume["position"], bool(manifest["complete"])
        return manifest, Commit(train, validation, manifest["quarantine"], position, complete)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} was not written by the sharder, or was altered", repr(error), "choose another --out"
        ) from None


def settings_record(settings: ShardConfig) -> dict[str, Any]:
    """The settings that decide what is written."""
    left_out = {"inputs", "out", "val_out", "on_bad_record"}
    if settings.mode != "smoke":
        left_out.add("take")
    if settings.mode != "split":
        left_out |= {"val_ratio", "seed"}
    if settings.dataset is None:
        left_out |= {"dataset", "subset", "revision", "split"}
    else:
        left_out.add("text_unit")
    return settings.model_dump(mode="json", exclude=left_out)


def check_same_settings(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError that names each difference."""
    differences = [
        f"{key} was {before.get(key, 'not set')!r}, and is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise ConfigError(
            f"{out} was begun with other settings",
            "; ".join(differences),
            "use the same settings to go on, or another directory",
        )


def _validation_shards(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` shards that a validation manifest lists: it may be one commit ahead."""
    if not count:
        return []
    shards = read_json(folder / SHARD_MANIFEST)["shards"]
    if len(shards) < count:
        raise DataError(
            f"{folder / SHARD_MANIFEST} lists {len(shards)} shards",
            f"{count} were complete",
            "restore it, or shard anew",
        )
    return list(shards[:count])


def _write(folder: Path, head: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    # one line a shard, made by hand: json is slow with an indent, and this is written after every shard
    lines = ",\n".join(f"    {json.dumps(shard)}" for shard in shards)
    listed = f"[\n{lines}\n  ]" if shards else "[]"
    text = json.dumps(head, indent=2, ensure_ascii=False)
    atomic_write(folder / SHARD_MANIFEST, f'{text[:-2]},\n  "shards": {listed}\n}}\n')
