"""The validations of one or more runs side by side: which checkpoint is worth exporting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainway.checkpoint.store import CheckpointStore
from trainway.errors import ConfigError
from trainway.gad.samples import Sample, read_samples
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl

STAGE = "gad/stage"
"""Key of the stage, a word, in a record of metrics.jsonl."""


@dataclass(frozen=True)
class Validated:
    """What is known of one step of a run: its validation, its checkpoint, or both."""

    run: Path
    step: int
    stage: str
    """Of adversarial distillation; empty for a recipe without stages."""
    saved: bool
    """Its checkpoint is on the disk."""
    is_latest: bool
    is_best: bool
    figures: dict[str, float] = field(default_factory=dict)
    """By name, such as val/loss; what was not measured, or came out as no number, is absent."""


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt, the teacher's answer, and what each validated step of each run made of it."""

    prompt: str
    teacher: str
    students: list[tuple[Path, Sample]]


def compare(targets: Sequence[str | Path]) -> list[Validated]:
    """The validations and checkpoints of runs, in the order given, each run's in ascending order of step.

    Args:
        targets: run directories, or checkpoints in them (`run/checkpoints/step-N`, `latest`, `best`) for one step alone.

    Raises:
        ConfigError: one of them is neither.
    """
    return [row for run, step in map(_target, targets) for row in _validated(run, step)]


def compare_samples(targets: Sequence[str | Path], count: int) -> list[PromptAnswers]:
    """The first `count` prompts that samples.jsonl of the same targets answer, with all that was answered.

    Raises:
        ConfigError: as `compare`.
    """
    found: dict[tuple[str, str], PromptAnswers] = {}
    for run, step in map(_target, targets):
        for sample in read_samples(run.samples):
            if step not in (None, sample.step):
                continue
            asked = (sample.prompt, sample.teacher)
            if asked not in found and len(found) == count:
                continue
            answers = found.setdefault(asked, PromptAnswers(*asked, students=[]))
            answers.students.append((run.path, sample))
    return list(found.values())


def _target(target: str | Path) -> tuple[RunDir, int | None]:
    """The run, and the step if the target is one of its checkpoints."""
    path = Path(target)
    run = RunDir(path)
    if any(part.exists() for part in (run.config, run.metrics, run.checkpoints)):
        return run, None
    beside = run.checkpoints.name
    parent = path.parent if path.parent.name == beside else path.resolve().parent  # "." lies somewhere, too
    step = path.resolve().name.removeprefix("step-")
    if path.is_dir() and parent.name == beside and step.isdecimal():
        return RunDir(parent.parent), int(step)
    raise ConfigError(
        f"{target} is neither a run nor a checkpoint",
        "there is no config.yaml, metrics.jsonl or checkpoints directory in it, and it is no step of a run"
        if path.exists()
        else "there is nothing of that name",
        "give run directories, or checkpoints such as runs/NAME/checkpoints/step-500; `trainway runs` lists the runs",
    )


def _validated(run: RunDir, only: int | None) -> list[Validated]:
    saved = {info.step: info for info in CheckpointStore(run.checkpoints, keep_last=1).describe()}
    figures, stages = _read_metrics(run.metrics)
    steps = sorted(figures.keys() | saved.keys()) if only is None else [only]
    return [
        Validated(
            run=run.path,
            step=step,
            stage=stages.get(step, ""),
            saved=step in saved,
            is_latest=step in saved and saved[step].is_latest,
            is_best=step in saved and saved[step].is_best,
            figures=figures.get(step, {}),
        )
        for step in steps
    ]


def _read_metrics(path: Path) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """The figures of each validated step, and the stage of each step that a record names one for."""
    figures: dict[int, dict[str, float]] = {}
    stages: dict[int, str] = {}
    for record in read_jsonl(path):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        step = record["step"]
        if isinstance(record.get(STAGE), str):
            stages[step] = record[STAGE]
        if validation := dict(_numbers(record)):
            figures.setdefault(step, {}).update(validation)
    return figures, stages


def _numbers(record: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        if name.startswith("val/") and isinstance(value, int | float) and math.isfinite(value):
            yield name, value
