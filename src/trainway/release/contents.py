"""What a release consists of: a directory made from a run, checked for secrets, every file known by its hash."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trainway import __version__
from trainway.checkpoint.adapter import ADAPTER_CONFIG
from trainway.checkpoint.manifest import MANIFEST
from trainway.checkpoint.store import CheckpointStore
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError
from trainway.files import atomic_directory, atomic_write, read_json
from trainway.release.allowed import CARD, RECORDS, SUMS, Left, allowed_files
from trainway.release.base_id import Base, find_base_id
from trainway.release.card import VAL_LOSS, Facts, make_card
from trainway.release.order import Contents, File, Order
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl

Say = Callable[[str], None]

PICTURE = "loss.png"
PUBLISHED = (
    "started",
    "config_hash",
    "data_hash",
    "git",
    "versions",
    "platform",
    "cpu",
    "datasets",
    "devices",
)
"""What the world may know of where a run comes from: neither the command line nor the name of the machine."""
PLACES = ("run_dir", "runs_dir", "name")
"""Settings that say where something lies on the machine that trained."""


def chosen_step(run: RunDir, which: str | int) -> int:
    """The step of the checkpoint to release. Without an evaluation there is no best one, and the latest is taken.

    Raises ConfigError when there is none, or not this one.
    """
    found = CheckpointStore(run.checkpoints, keep_last=1).describe() if run.checkpoints.is_dir() else []
    if not found:
        raise ConfigError(
            f"{run.path} holds no checkpoints",
            "it is not a run directory, or nothing was saved yet",
            "`trainway runs` lists the runs",
        )
    best = [info.step for info in found if info.is_best and which == "best"]
    step = which if isinstance(which, int) else [found[-1].step, *best][-1]
    if step not in [info.step for info in found]:
        steps = ", ".join(str(info.step) for info in found)
        raise ConfigError(
            f"{run.path} has no checkpoint of step {step}", f"it has {steps}", "name one of them"
        )
    return step


def make_contents(run: RunDir, order: Order, step: int, out: Path, say: Say) -> Contents:
    """Export the checkpoint of `step` into the new directory `out`, with the card and the records of the training.

    Raises:
        ConfigError: nothing to merge, a base that is no id of the Hub.
        DataError: the checkpoint or one of the run's files is damaged.
        EnvironmentFault: the disk is full, read-only or failing.
    """
    from trainway.release.bundle import export  # transformers takes its time

    config, provenance = read_run(run)
    base = find_base_id(config, provenance, order.base)
    with atomic_directory(out) as directory:
        directory.rmdir()  # the export makes it
        export(run.path, directory, which=step, merge=order.merge)
        _, left = allowed_files(directory)
        for name in left:
            _remove(directory / name.path)
        if (directory / ADAPTER_CONFIG).exists():
            _name_base(directory / ADAPTER_CONFIG, base, say)
        _write_records(run, config, provenance, base, directory)
        _write_card(run, config, provenance, base, order, step, directory)
        files = [list_file(directory, name) for name in allowed_files(directory)[0]]
        sums = "".join(f"{file.sha256}  {file.path}\n" for file in files)
        (directory / SUMS).write_text(sums, encoding="utf-8")
        # as a record for the next attempt: it is no file of the release, and is not sent
    atomic_write(_left_record(out), json.dumps([[one.path, one.reason] for one in left]) + "\n")
    return open_contents(out, base)


def open_contents(directory: Path, base: Base) -> Contents:
    """A release that was made before. Raises DataError when its files are not those that were made."""
    names, foreign = allowed_files(directory)
    files = tuple(list_file(directory, name) for name in names)
    told = dict(_read_sums(directory / SUMS))
    wrong = [file.path for file in files if file.path != SUMS and told.get(file.path) != file.sha256]
    wrong += [one.path for one in foreign] + sorted(told.keys() - {file.path for file in files})
    if wrong:
        raise DataError(
            f"{directory} is not what was made there: {', '.join(wrong[:4])}", "", f"remove {directory}"
        )
    record = _left_record(directory)
    left = [Left(*pair) for pair in read_json(record)] if record.exists() else []
    return Contents(directory, files, tuple(left), base)


def list_file(directory: Path, name: str) -> File:
    """A file with its hashes; it is read once, in blocks."""
    place = directory / name
    size = place.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with place.open("rb") as opened:
        while block := opened.read(8 << 20):
            sha256.update(block)
            git.update(block)
    return File(name, size, sha256.hexdigest(), git.hexdigest())


def read_run(run: RunDir) -> tuple[RunConfig, dict[str, Any]]:
    """The settings and the provenance of a run.

    Raises ConfigError or DataError when they are not those of a run of this version.
    """
    try:
        config = RunConfig.model_validate(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{run.config} is not a configuration of this version", why, "use the version that trained it"
        ) from None
    provenance = read_json(run.provenance) if run.provenance.exists() else {}
    if not isinstance(provenance, dict):
        raise DataError(f"{run.provenance} is malformed", "it is no mapping", "restore it, or remove it")
    return config, provenance


def order_key(run: RunDir, order: Order, step: int) -> str:
    """Names what an order makes of a run: the same for each attempt at the same release."""
    values = [order.repo, order.tag, order.merge, order.licence, order.base, step, __version__]
    text = json.dumps([*values, _checkpoint_hash(run, step)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checkpoint_hash(run: RunDir, step: int) -> str:
    """What tells one checkpoint from another of the same step: its manifest holds the hash of every file."""
    return hashlib.sha256((run.checkpoints / f"step-{step}" / MANIFEST).read_bytes()).hexdigest()


def _name_base(path: Path, base: Base, say: Say) -> None:
    """Let peft find the base on the Hub, or nowhere: a directory of this machine is no place for others."""
    fields = read_json(path)
    fields["base_model_name_or_path"], fields["revision"] = base.id, base.commit
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    if base.id is None:
        say(f"the adapter names no base model: {base.reason}; --merge makes a model that needs none")


def _write_records(
    run: RunDir, config: RunConfig, provenance: Mapping[str, Any], base: Base, directory: Path
) -> None:
    from trainway.config.files import config_values, yaml_text

    folder = directory / RECORDS
    folder.mkdir()
    values = config_values(config)
    for key in PLACES:
        values.pop(key, None)
    values.get("data", {}).pop("store_dir", None)
    values.pop("release", None)
    (folder / "config.yaml").write_text(yaml_text(_without_places(values)), encoding="utf-8")
    known = {key: provenance[key] for key in PUBLISHED if key in provenance}
    known["base_model"] = {"id": base.id, "commit": base.commit} if base.id else None
    (folder / "provenance.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for source in (run.metrics, run.report):  # the page report.html names places on this machine
        if source.is_file():
            shutil.copyfile(source, folder / source.name)


def _without_places(value: Any) -> Any:
    """Settings with places on a machine, in a bucket or at an address cut down to their last name."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(item) for item in value]
    if not isinstance(value, str) or value.startswith("hf://"):
        return value
    is_place = "://" in value or value.startswith(("/", "./", "../", "~")) or "\\" in value
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_place else value


def _write_card(
    run: RunDir,
    config: RunConfig,
    provenance: Mapping[str, Any],
    base: Base,
    order: Order,
    step: int,
    directory: Path,
) -> None:
    report = read_json(run.report) if run.report.exists() else {}
    facts = Facts(
        config=config,
        provenance=provenance,
        report=report if isinstance(report, dict) else {},
        step=step,
        metrics=_metrics(run, step),
        base=base,
        repo=order.repo,
        tag=order.tag,
        licence=order.licence,
        is_adapter=(directory / ADAPTER_CONFIG).exists(),
        has_picture=_draw(run, directory / PICTURE),
        cost=order.cost,
        run_name=run.path.name,
    )
    (directory / CARD).write_text(make_card(facts), encoding="utf-8", errors="replace")


def _metrics(run: RunDir, step: int) -> dict[str, float]:
    """What validation found at a step."""
    found: dict[str, float] = {}
    for record in read_jsonl(run.metrics):
        if isinstance(record, dict) and record.get("step") == step:
            found |= {
                key: float(value)
                for key, value in record.items()
                if key.startswith("val/") and isinstance(value, (int, float)) and math.isfinite(value)
            }
    return found


def _draw(run: RunDir, path: Path) -> bool:
    """Draw the losses, where there are both kinds."""
    from trainway.report.chart import draw_losses  # matplotlib takes its time

    kinds = {key for record in read_jsonl(run.metrics) for key in ("train/loss", VAL_LOSS) if key in record}
    if len(kinds) < 2:
        return False
    draw_losses(run, path)
    return True


def _read_sums(path: Path) -> list[tuple[str, str]]:
    """(name, sha256) of each line of SHA256SUMS; empty where there is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(name, digest) for digest, _, name in (line.partition("  ") for line in lines)]


def _left_record(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.left.json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
