"""The checkpoints of one or more runs side by side: which one is worth exporting. Any recipe, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from trainway.checkpoint.state import STATE_FILE
from trainway.checkpoint.store import CheckpointStore
from trainway.errors import ConfigError, DataError
from trainway.files import read_json
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl
from trainway.training.evaluations import Evaluation, newest_figures, read_evaluations

STAGE = "gad/stage"
"""Key of the stage, a word, in a record of metrics.jsonl."""
TOKENS = "train/tokens"
PLACES = ("run_dir", "runs_dir", "name", "data.store_dir")
"""Settings that say where a run lies: no two have the same."""
_LOWER_IS_BETTER = ("loss", "ppl", "perplexity", "bpb", "truncated", "step", "tokens", "hours", "dollars")
_OWN = ("step", "tokens", "hours", "dollars")
"""What rows can be sorted by beside their figures."""


@dataclass(frozen=True)
class Validated:
    """What is known of one step of a run: its validation, its evaluations, its checkpoint, or all of them."""

    run: Path
    step: int
    stage: str
    """Of adversarial distillation; empty for a recipe without stages."""
    saved: bool
    """Its checkpoint is on the disk."""
    is_latest: bool
    is_best: bool
    figures: dict[str, float] = field(default_factory=dict)
    """By name, such as val/loss, of `trainway eval` TASK/METRIC and FILE/val/loss too; what was not measured, or came
    out as no number, is absent."""
    tokens: int | None = None
    """Target tokens trained on."""
    hours: float | None = None
    """Of training until here, over all launches; None for a step that is not saved."""
    dollars: float | None = None
    """None where the price or the number of GPUs is not known."""


@dataclass(frozen=True)
class Answer:
    """What one step of a run made of a prompt."""

    step: int
    text: str
    truncated: bool = False
    """Cut off before it came to an end."""
    score: float | None = None
    """The discriminator's; None where there is none."""
    teacher_score: float | None = None
    best: bool = False
    """Answered once more after training, by the best checkpoint."""


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt, what the data or the teacher says there, and what each step of each run made of it."""

    prompt: str
    reference: str | None
    by_teacher: bool
    answers: list[tuple[Path, Answer]]


def compare(targets: Sequence[str | Path], *, gpu_price: float | None = None) -> list[Validated]:
    """The validations and checkpoints of runs, in the order given, each run's in ascending order of step.

    Args:
        targets: run directories, or checkpoints in them (`run/checkpoints/step-N`, `latest`, `best`) for one step alone.
        gpu_price: USD of one GPU for an hour, for the dollars.

    Raises:
        ConfigError: one of them is neither.
    """
    rows = [row for run, step in map(_target, targets) for row in _validated(run, step)]
    if gpu_price is None:
        return rows
    ranks = {run: _num_ranks(RunDir(run)) for run in {row.run for row in rows}}
    return [replace(row, dollars=_dollars(row.hours, ranks[row.run], gpu_price)) for row in rows]


def ranked(rows: Sequence[Validated], by: str) -> list[Validated]:
    """The rows sorted by a figure, the best first; those without it last.

    by: `step`, `tokens`, `hours`, `dollars`, or the name of a figure; `loss` stands for `val/loss` and so on.
    Lower is better for losses, perplexities, bits per byte and costs.

    Raises:
        ConfigError: no row has it; those that there are are listed.
    """
    names = sorted({name for row in rows for name in row.figures})
    name = by if by in _OWN or by in names else f"val/{by}"
    values = [getattr(row, name) if name in _OWN else row.figures.get(name) for row in rows]
    if all(value is None for value in values):
        raise ConfigError(
            f"there is no {by} to sort by",
            f"there are {', '.join([*_OWN, *names])}",
            "choose one of them, or measure it: `trainway eval RUN --which all`",
        )
    sign = (
        1 if name.rpartition("/")[2].startswith(_LOWER_IS_BETTER) or name.endswith(_LOWER_IS_BETTER) else -1
    )
    keys = [math.inf if value is None else sign * value for value in values]
    return [rows[place] for place in sorted(range(len(rows)), key=keys.__getitem__)]


def compare_settings(targets: Sequence[str | Path]) -> dict[str, dict[Path, Any]]:
    """The settings, by dotted name, that are not the same in all runs, with each run's value; absent: None.

    Raises:
        ConfigError: as `compare`.
    """
    runs = list(dict.fromkeys(run.path for run, _ in map(_target, targets)))
    flat = {run: dict(_flattened(_settings(RunDir(run)))) for run in runs}
    names = dict.fromkeys(name for settings in flat.values() for name in settings)
    values = {name: {run: flat[run].get(name) for run in runs} for name in names if name not in PLACES}
    return {name: found for name, found in values.items() if len(set(map(_as_text, found.values()))) > 1}


def compare_samples(targets: Sequence[str | Path], count: int) -> list[PromptAnswers]:
    """The first `count` prompts that samples.jsonl and the evaluations of the same targets answer, with all answers.

    Raises:
        ConfigError: as `compare`.
    """
    found: dict[tuple[str, str | None], PromptAnswers] = {}
    for run, step in map(_target, targets):
        for asked, answer in _answers(run):
            if step not in (None, answer.step):
                continue
            key = (asked.prompt, asked.reference)
            if key not in found and len(found) == count:
                continue
            found.setdefault(key, asked).answers.append((run.path, answer))
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
    evaluations = read_evaluations(run)
    metrics = _Metrics(run.metrics)
    measured = {one.step for one in evaluations if one.step is not None}
    steps = sorted(metrics.figures.keys() | saved.keys() | measured) if only is None else [only]
    rows = []
    for step in steps:
        state = _state(saved[step].path) if step in saved else {}
        seconds, seen = state.get("elapsed_s"), state.get("tokens_seen")
        rows.append(
            Validated(
                run=run.path,
                step=step,
                stage=metrics.stages.get(step, ""),
                saved=step in saved,
                is_latest=step in saved and saved[step].is_latest,
                is_best=step in saved and saved[step].is_best,
                # training's own figures: an evaluation may have read more or fewer tokens
                figures=newest_figures(evaluations, step) | metrics.figures.get(step, {}),
                tokens=seen if seen is not None else metrics.tokens.get(step),
                hours=None if seconds is None else seconds / 3600,
            )
        )
    return rows


class _Metrics:
    """By step: the figures of validations, the stage that a record names, and the tokens trained on."""

    def __init__(self, path: Path) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.stages: dict[int, str] = {}
        self.tokens: dict[int, int] = {}
        for record in read_jsonl(path):
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                continue
            step = record["step"]
            if isinstance(record.get(STAGE), str):
                self.stages[step] = record[STAGE]
            if isinstance(record.get(TOKENS), int):
                self.tokens[step] = record[TOKENS]
            if validation := dict(_numbers(record)):
                self.figures.setdefault(step, {}).update(validation)


def _numbers(record: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        if name.startswith("val/") and isinstance(value, int | float) and math.isfinite(value):
            yield name, value


def _state(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint's state says; empty where it cannot be read."""
    try:
        content = read_json(checkpoint / STATE_FILE)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _num_ranks(run: RunDir) -> int | None:
    try:
        content = read_json(run.report)
    except DataError:
        return None  # not done yet
    ranks = content.get("world_size") if isinstance(content, dict) else None
    return ranks if isinstance(ranks, int) else None


def _dollars(hours: float | None, ranks: int | None, gpu_price: float) -> float | None:
    return None if hours is None or ranks is None else hours * ranks * gpu_price


def _settings(run: RunDir) -> dict[str, Any]:
    try:
        found = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _answers(run: RunDir) -> Iterator[tuple[PromptAnswers, Answer]]:
    for record in read_jsonl(run.samples):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if found := _answer(record):
            yield found
    for evaluation in read_evaluations(run):
        yield from _evaluated(evaluation)


def _answer(record: dict[str, Any]) -> tuple[PromptAnswers, Answer] | None:
    """Of either form: adversarial distillation's, beside its teacher's, or a continued prompt; None for any other."""
    by_teacher = "student" in record
    text = record.get("student" if by_teacher else "text")
    reference = record.get("teacher" if by_teacher else "reference")
    if not isinstance(record.get("prompt"), str) or not isinstance(text, str):
        return None
    if by_teacher and not all(name in record for name in ("teacher", "score", "teacher_score", "truncated")):
        return None
    answer = Answer(
        record["step"],
        text,
        bool(record.get("truncated")),
        record.get("score"),
        record.get("teacher_score"),
        bool(record.get("best")),
    )
    return PromptAnswers(record["prompt"], reference, by_teacher, []), answer


def _evaluated(one: Evaluation) -> Iterator[tuple[PromptAnswers, Answer]]:
    for sample in one.samples:
        if one.step is not None:
            yield PromptAnswers(sample["prompt"], None, False, []), Answer(one.step, sample["text"])
