"""All that a run directory says about its run, read without judging it: what is missing or damaged is absent."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainway.checkpoint.lock import lock_holder
from trainway.checkpoint.store import CheckpointInfo, CheckpointStore
from trainway.errors import ConfigError, DataError
from trainway.files import read_json
from trainway.report.series import RunSeries
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl

MOST_PROMPTS = 8
MOST_ANSWERS = 8
"""Of a prompt: the first, the newest, and evenly spread ones between."""
LONGEST_TEXT = 2000
"""Characters of a prompt or an answer."""
MOST_WARNINGS = 100
LONGEST_CONFIG = 4 << 20
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)Z (WARNING|ERROR|CRITICAL) (.*)")


@dataclass(frozen=True)
class Answer:
    """What was written after a prompt."""

    step: int
    text: str
    best: bool
    """By the best checkpoint's weights, after the last step."""
    score: float | None
    """The discriminator's, in adversarial distillation."""


@dataclass
class Asked:
    """A prompt, what it is to be answered with where that is known, and the answers over the steps."""

    prompt: str
    reference: str
    answers: list[Answer] = field(default_factory=list)
    every: int = 1
    count: int = 0
    newest: Answer | None = None

    def add(self, answer: Answer) -> None:
        """Keep every so-many-th answer: half of them go when they become too many."""
        if self.count % self.every == 0:
            self.answers.append(answer)
        self.count, self.newest = self.count + 1, answer
        if len(self.answers) > 8 * MOST_ANSWERS:
            self.answers, self.every = self.answers[::2], self.every * 2

    def spread(self) -> list[Answer]:
        """At most MOST_ANSWERS of them, the newest first."""
        found = [
            *self.answers,
            *([self.newest] if self.newest not in self.answers[-1:] and self.newest else []),
        ]
        last = len(found) - 1
        places = {round(i * last / (MOST_ANSWERS - 1)) for i in range(MOST_ANSWERS)}
        return [answer for i, answer in reversed(list(enumerate(found))) if i in places]


@dataclass(frozen=True)
class Warned:
    """A line of the log from warnings up."""

    time: str
    level: str
    message: str


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory describes it."""

    run: RunDir
    name: str
    state: str
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    """By dotted key, as it was resolved."""
    result: Mapping[str, Any]
    """report.json of a run that is done."""
    provenance: Mapping[str, Any]
    start: Mapping[str, Any]
    """start.json: origins of the settings, figures of the data, the plan."""
    series: RunSeries
    asked: Sequence[Asked]
    checkpoints: Sequence[CheckpointInfo]
    warned: Sequence[Warned]
    damaged: Sequence[str]
    """Files that cannot be read."""

    def number(self, *path: str) -> float | None:
        """A number of report.json (`result`), start.json (`start`) ... by its keys; None where there is none."""
        found: Any = getattr(self, path[0])
        for key in path[1:]:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    def last(self, metric: str) -> float | None:
        return self.series.last[metric][1] if metric in self.series.last else None

    @property
    def step(self) -> int:
        steps = [step for step, _ in self.series.last.values()]
        return int(self.number("result", "steps") or max([*steps, int(self.number("status", "step") or 0)]))


def read_run(path: Path, most_points: int) -> RunFacts:
    """Read a run directory. `most_points`: of each metric.

    Raises:
        ConfigError: it is no run directory.
    """
    run = RunDir(path)
    if not run.config.is_file():
        raise ConfigError(
            f"{path} is no run directory",
            "it has no config.yaml",
            "`trainway runs DIR` lists the runs in a directory",
        )
    damaged: list[str] = []
    status = _object(run.status, damaged)
    series = RunSeries(run.metrics, most_points)
    series.update()
    return RunFacts(
        run=run,
        name=path.resolve().name,
        state=_state(run, status),
        status=status,
        config=_flat_config(run.config, damaged),
        result=_object(run.report, damaged) if status.get("state") == "done" else {},
        provenance=_object(run.provenance, damaged),
        start=_object(run.start, damaged),
        series=series,
        asked=_samples(run.samples),
        checkpoints=_checkpoints(run, damaged),
        warned=_warnings(run.log),
        damaged=damaged,
    )


def _state(run: RunDir, status: Mapping[str, Any]) -> str:
    state = str(status.get("state", "new"))
    return "killed" if state == "running" and lock_holder(run) is None else state


def _object(path: Path, damaged: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except DataError as error:
        damaged.append(f"{path.name}: {error.why or error.what}")
        return {}
    if not isinstance(found, dict):
        damaged.append(f"{path.name}: not an object")
        return {}
    return found


def _flat_config(path: Path, damaged: list[str]) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_CONFIG:
            raise ValueError("too long for a configuration")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        damaged.append(f"{path.name}: {str(error).splitlines()[0]}")
        return {}
    flat: dict[str, Any] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, dict):
            flat |= {f"{name}.{leaf}": item for leaf, item in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _samples(path: Path) -> list[Asked]:
    """The prompts that were answered first, in bounded memory however often they were asked."""
    found: dict[str, Asked] = {}
    for record in read_jsonl(path):
        prompt, step = (
            (record.get("prompt"), record.get("step")) if isinstance(record, dict) else (None, None)
        )
        if not isinstance(prompt, str) or type(step) is not int:
            continue
        if prompt not in found and len(found) == MOST_PROMPTS:
            continue
        reference = record.get("teacher", record.get("reference", ""))
        asked = found.setdefault(prompt, Asked(_cut(prompt), _cut(reference)))
        score = record.get("score")
        asked.add(
            Answer(
                step,
                _cut(record.get("student", record.get("text", ""))),
                record.get("best") is True,
                float(score) if isinstance(score, int | float) else None,
            )
        )
    return list(found.values())


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def _checkpoints(run: RunDir, damaged: list[str]) -> list[CheckpointInfo]:
    try:
        return CheckpointStore(run.checkpoints, keep_last=1).describe()
    except OSError as error:
        damaged.append(f"{run.checkpoints.name}: {error.strerror}")
        return []


def _warnings(path: Path) -> list[Warned]:
    """The newest warnings and errors of the log, oldest first."""
    found: deque[Warned] = deque(maxlen=MOST_WARNINGS)
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if match := _LOG_LINE.match(line):
                    message = match[3].removeprefix("warning: ")
                    found.append(Warned(match[1].replace("T", " "), match[2].lower(), _cut(message)))
    except OSError:
        return []
    return list(found)
