"""What `trainway eval` found, as it is kept beside a run: one JSON file for each checkpoint and what it was evaluated on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from trainway.checkpoint.manifest import MANIFEST
from trainway.errors import DataError
from trainway.files import atomic_write, hash_file, read_json
from trainway.run_dir import RunDir

FORMAT = 1
VALIDATION = "validation"
"""The name, in `Evaluation.data`, of a run's own validation split."""


@dataclass(frozen=True)
class Evaluation:
    """What one model is worth. Figures have the names of metrics.jsonl; one that is not a number is None."""

    model: str
    """As it was named."""
    run: str | None
    """Its run directory; None for a model that is in none."""
    step: int | None
    checkpoint: str | None
    """Hash of the checkpoint's manifest: a checkpoint of the same step that is trained anew has another one."""
    date: str
    """UTC, ISO 8601."""
    data: tuple[str, ...] = ()
    """The files, as they were named; ("validation",) for the run's own split; empty where only tasks were asked for."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """val/loss, val/loss_low, val/loss_high, val/ppl, val/bpb, val/bpb_low, val/bpb_high, val/tokens, val/bytes,
    val/documents."""
    sources: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """The same figures of each source, where there are several."""
    difference: dict[str, float | None] = field(default_factory=dict)
    """bpb, low, high: this model's bits per byte less those of the first one of the same call, by document."""
    tasks: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """lm-evaluation-harness: of each task its metrics, their standard errors, and num_samples."""
    samples: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was measured: precision, device, rows, packing, what counts, versions."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return _finite({"format": FORMAT, **asdict(self)})


def keep_evaluation(evaluation: Evaluation) -> Path | None:
    """Write it beside its run, in place of an older one of the same step on the same; None for a model in no run.

    Raises EnvironmentFault when the disk is full or read-only.
    """
    if evaluation.run is None:
        return None
    folder = RunDir(Path(evaluation.run)).evaluations
    asked = [evaluation.data, sorted(evaluation.tasks), evaluation.settings.get("asked")]
    key = xxhash.xxh3_64_hexdigest(json.dumps(asked, sort_keys=True, default=str).encode())[:8]
    what = "-".join(
        (["tasks"] if evaluation.tasks else []) + (["loss"] if evaluation.figures else []) or ["samples"]
    )
    path = folder / f"step-{evaluation.step}-{what}-{key}.json"
    folder.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False) + "\n")
    return path


def read_evaluations(run: RunDir) -> list[Evaluation]:
    """The evaluations of a run's checkpoints, oldest first; files of another form are left out.

    So are those of a checkpoint that has been trained anew since.
    """
    found = [_read(path) for path in sorted(run.evaluations.glob("step-*.json"))]
    mine = [one for one in found if one is not None and not _is_stale(run, one)]
    return sorted(mine, key=lambda one: (one.date, one.step or 0))


def checkpoint_identity(checkpoint: Path) -> str:
    """A hash that differs whenever a file of the checkpoint does."""
    return hash_file(checkpoint / MANIFEST)


def newest_figures(evaluations: Sequence[Evaluation], step: int) -> dict[str, float]:
    """The newest finite figures of a step, by name: of tasks `TASK/METRIC`, of files `FILE/val/loss` and the like."""
    found: dict[str, float | None] = {}
    for one in evaluations:
        if one.step != step:
            continue
        prefix = "" if one.data == (VALIDATION,) else f"{'+'.join(Path(name).name for name in one.data)}/"
        found |= {prefix + name: value for name, value in one.figures.items()}
        for task, metrics in one.tasks.items():
            found |= {f"{task}/{name}": value for name, value in metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


def _read(path: Path) -> Evaluation | None:
    try:
        content = read_json(path)
    except DataError:
        return None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        return None
    if set(content) != {one.name for one in fields(Evaluation)} or not isinstance(content["data"], list):
        return None
    return Evaluation(**{**content, "data": tuple(content["data"])})


def _is_stale(run: RunDir, evaluation: Evaluation) -> bool:
    checkpoint = run.checkpoints / f"step-{evaluation.step}"
    return (checkpoint / MANIFEST).is_file() and checkpoint_identity(checkpoint) != evaluation.checkpoint


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
