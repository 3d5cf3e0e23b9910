"""The stages of a boot. Each says what it did and why, and does nothing when its output is complete and verified."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from trainway import __version__
from trainway.checkpoint.store import CheckpointStore
from trainway.config.files import config_values, toml_text, yaml_text
from trainway.config.load import config_difference, load_config
from trainway.config.resolved import flat_config
from trainway.config.schema import DataConfig, RunConfig, ShardConfig
from trainway.data.shards import SHARD_MANIFEST
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_write, hash_file, read_json
from trainway.recipes.volume import Volume
from trainway.training.runs import refuse_changed_settings, run_status

Progress = Callable[[str, int, int], None]
"""Told (label, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Outcome:
    """What a stage did, in a line for people."""

    state: Literal["done", "skipped"]
    why: str


@dataclass(frozen=True)
class ShardFile:
    """One file of a directory of shards, its content known by its hash."""

    path: Path
    size: int
    hash: str


@dataclass(frozen=True)
class ShardRequest:
    """What is to be sharded; nothing when the shards on the volume are to be used."""

    inputs: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    lines: int = 250_000
    format: Literal["text", "jsonl"] = "jsonl"
    gzip: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.inputs and self.dataset is None


def shards(volume: Volume, request: ShardRequest, data: DataConfig, seed: int, report: Progress) -> Outcome:
    """Shard the input, or verify what an earlier call or another tool has put on the volume.

    Raises DataError naming the shard that is missing or altered, or when there are no shards and nothing to shard;
    ConfigError when the directory was begun with another input or other settings.
    """
    complete = _all_complete(volume, request)
    if complete and request.dataset is not None:
        _check_settings(volume, request, data, seed)  # the sharder would load the library of datasets first
    if request.is_empty or (complete and (request.dataset is not None or is_gone(request.inputs))):
        if complete is False:
            raise DataError(
                f"the shards of {volume.experiment} are not complete",
                f"sharding was interrupted: {_unfinished(volume) / SHARD_MANIFEST}",
                "give --input again: sharding goes on where it was",
            )
        found = shard_files(volume.train_shards)
        if not found:
            raise DataError(
                f"there are no shards in {volume.train_shards}",
                "nothing is to be sharded either",
                "name a source: --input FILE or --dataset ID; or put shards there",
            )
        found += shard_files(volume.val_shards)
        note = "" if complete else "; without a manifest, so their hashes are those of today"
        return Outcome("skipped", f"complete and verified: {_amount(found)}{note}")
    from trainway.data.shard import shard

    reports = [shard(settings, progress=report) for settings in _shard_settings(volume, request, data, seed)]
    found = shard_files(volume.train_shards, verify=False)
    held_out = shard_files(volume.val_shards, verify=False)
    if not held_out:
        raise DataError(
            "no document fell to validation",
            f"data.val_ratio {data.val_ratio:g} of {reports[0].train['lines']:,} documents",
            f"move {volume.train_shards} and {volume.val_shards} away, then raise data.val_ratio or give --validation",
        )
    found += held_out
    if all(item.cached for item in reports):
        return Outcome("skipped", f"complete and verified: {_amount(found)}")
    lines = sum(part["lines"] for item in reports for part in (item.train, item.validation) if part)
    aside = sum(item.quarantined for item in reports)
    note = f", {aside:,} malformed set aside" if aside else ""
    return Outcome("done", f"{lines:,} documents in {_amount(found)}{note}")


def _check_settings(volume: Volume, request: ShardRequest, data: DataConfig, seed: int) -> None:
    from trainway.data.shard_manifest import check_same_settings, settings_record

    for settings in _shard_settings(volume, request, data, seed):
        folder = Path(settings.out)
        check_same_settings(folder, read_json(folder / SHARD_MANIFEST)["settings"], settings_record(settings))


def _shard_settings(
    volume: Volume, request: ShardRequest, data: DataConfig, seed: int
) -> Iterator[ShardConfig]:
    common: dict[str, Any] = {
        "format": request.format,
        "gzip": request.gzip,
        "lines_per_shard": request.lines,
        "text_field": data.text_field,
        "on_bad_record": data.on_bad_record,
        "max_document_mib": data.max_document_mib,
    }
    source: dict[str, Any] = {"inputs": request.inputs, "text_unit": data.text_unit}
    if request.dataset is not None:
        source = {"dataset": request.dataset, "subset": request.subset}
    places: dict[str, Any] = {"out": str(volume.train_shards.absolute())}
    if request.validation:
        yield ShardConfig(mode="prod", **common, **source, **places)
        held_out: dict[str, Any] = {"inputs": request.validation, "text_unit": data.text_unit}
        yield ShardConfig(mode="prod", **common, **held_out, out=str(volume.val_shards.absolute()))
    else:
        places["val_out"] = str(volume.val_shards.absolute())
        yield ShardConfig(mode="split", val_ratio=data.val_ratio, seed=seed, **common, **source, **places)


def shard_files(folder: Path, *, verify: bool = True) -> list[ShardFile]:
    """The data files of a directory of shards with their hashes; empty when there are none.

    verify: read every byte. Without it a manifest is believed.
    """
    if (folder / SHARD_MANIFEST).is_file() and not verify:
        listed = read_json(folder / SHARD_MANIFEST)["shards"]
        return [ShardFile(folder / item["file"], item["bytes"], item["hash"]) for item in listed]
    if not any(not name.startswith(".") and name != SHARD_MANIFEST for name in os.listdir(folder)):
        return []
    from trainway.data.sources import find_sources

    sources = find_sources((str(folder.absolute()),), DataConfig(), setting="shards")
    return [ShardFile(item.path, item.size, item.hash or hash_file(item.path)) for item in sources]


def _all_complete(volume: Volume, request: ShardRequest) -> bool | None:
    """What the manifests say; None without one that the sharder wrote."""
    train, held_out = _is_complete(volume.train_shards), _is_complete(volume.val_shards)
    if held_out is False or (request.validation and held_out is None and train is not None):
        return False
    return train


def _is_complete(folder: Path) -> bool | None:
    path = folder / SHARD_MANIFEST
    manifest = read_json(path) if path.is_file() else None
    return manifest.get("complete") if isinstance(manifest, dict) else None


def _unfinished(volume: Volume) -> Path:
    folders = (volume.train_shards, volume.val_shards)
    return next(folder for folder in folders if _is_complete(folder) is False)


def is_gone(inputs: Sequence[str]) -> bool:
    """True when the input was a file that is no longer there: what was made of it is complete."""
    return bool(inputs) and not any(os.path.exists(path) or "*" in path for path in inputs)


def _amount(files: Sequence[ShardFile]) -> str:
    size = sum(item.size for item in files)
    return f"{len(files)} file{'s' if len(files) != 1 else ''}, {size / 1e6:,.1f} MB"


def configs(volume: Volume, config: RunConfig) -> tuple[Outcome, RunConfig]:
    """Write training.yaml and training.toml; the run that both load to. One that changed is kept as *.before.

    Raises ConfigError, and writes nothing, when the run was begun with other settings.
    """
    values, run = config_values(config), loaded(config)
    refuse_changed_settings(run, volume.run)
    texts = {"yaml": yaml_text(values), "toml": toml_text(values)}
    changed = {kind: volume.config(kind) for kind in texts if _text(volume.config(kind)) != texts[kind]}
    if not changed:
        return Outcome("skipped", f"complete and verified: {volume.config('yaml')}"), run
    notes = []
    for kind, path in changed.items():
        if path.exists():
            before = path.with_name(f"{path.name}.before")
            atomic_write(before, path.read_bytes())
            notes.append(f"{before.name} is what it was ({_difference(path, run)})")
        atomic_write(path, texts[kind])
    for kind in texts:
        assert load_config(volume.config(kind), environ={}).config == run, volume.config(kind)
    return Outcome("done", "; ".join([str(volume.config("yaml")), "training.toml", *notes])), run


def loaded(config: RunConfig) -> RunConfig:
    """`config` as the files that `configs` writes load: without what this run ignores."""
    return load_config(config_values(config), environ={}).config


def _difference(path: Path, run: RunConfig) -> str:
    try:
        before = load_config(path, environ={}).config
    except ConfigError as error:
        return error.what
    return "; ".join(config_difference(flat_config(before), flat_config(run))) or "only its text changed"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def prepared(volume: Volume, run: RunConfig, report: Progress) -> tuple[Outcome, Path]:
    """Make the token store of the shards, or verify the one made before of the same; where it is.

    Raises DataError naming the file of the store, or the shard, that was altered.
    """
    from trainway.data.store import TokenStore

    key = _store_key(volume, run)
    note = _read_note(volume.prepared)
    if note.get("key") == key and (store := volume.cache / str(note["store"])).is_dir():
        split = TokenStore.open(store).manifest.splits["train"]
        return Outcome("skipped", f"complete and verified: {split['tokens']:,} tokens"), store
    from trainway.data.prepare import prepare

    made = prepare(run, progress=report)
    atomic_write(volume.prepared, json.dumps({"key": key, "store": made.store_dir.name}, indent=1) + "\n")
    return Outcome("skipped" if made.cached else "done", made.summary), made.store_dir


def _store_key(volume: Volume, run: RunConfig) -> str:
    """Differs whenever the store could: its content's own name needs the tokenizer loaded, which takes a second.

    The shards were verified by their stage just now, so a manifest is believed.
    """
    content = {
        "version": __version__,
        "shards": [
            [[item.path.name, item.size, item.hash] for item in shard_files(folder, verify=False)]
            for folder in (volume.train_shards, volume.val_shards)
        ],
        "tokenizer": [[p.name, hash_file(p)] for p in sorted(volume.tokenizer.iterdir()) if p.is_file()],
        "data": run.data.model_dump(mode="json", exclude={"store_dir", "prefetch_steps"}),
        "seed": run.seed,
        "max_vocab": run.model.vocab_size,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def noted_store(volume: Volume) -> Path:
    """The token store that was made last."""
    return volume.cache / str(_read_note(volume.prepared)["store"])


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # it only saves time
    return note if isinstance(note, dict) and isinstance(note.get("store"), str) else {}


def finished_training(volume: Volume, store: Path) -> Outcome | None:
    """The outcome of a training that is done, its last checkpoint verified; None when there is something to train.

    Raises DataError when it was done with other data, or its checkpoint is damaged.
    """
    status = run_status(volume.run)
    if status["state"] != "done":
        return None
    if read_json(volume.run.provenance).get("data_hash") != store.name:
        raise DataError(
            f"{volume.run.path} is done, and was trained on other data",
            f"the shards and tokenizer on the volume now make the token store {store.name}",
            "restore them, or choose another --experiment",
        )
    step = int(status["step"])
    problems = CheckpointStore(volume.run.checkpoints, 1).verify(step)
    if problems:
        raise DataError(
            f"the last checkpoint of {volume.run.path} is damaged",
            "; ".join(problems),
            "restore it from a copy; `trainway checkpoints RUN --verify` lists those that are intact",
        )
    return Outcome("skipped", f"nothing to do: complete and verified at step {step:,}")
