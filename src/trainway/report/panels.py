"""Which charts are drawn of which metrics: known ones in a fixed order, unknown ones at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainway.report.series import Columns

COLOURS = 8
"""Of style.css."""
MOST_OTHERS = 40


@dataclass(frozen=True)
class Line:
    """A metric in a panel."""

    metric: str
    """A name that ends with * stands for all that begin so."""
    label: str = ""
    faint: bool = False
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart of one run; of several runs, a chart of each line."""

    section: str
    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    kind: str = "number"
    zero: bool = False
    log: bool = False
    wide: bool = False
    marks: tuple[tuple[str, float], ...] = ()


TRAINING, SPEED, DISTILLATION, SOURCES, OTHERS = "training", "speed", "distillation", "sources", "others"
HIDDEN = {"train/tokens", "val/tokens", "val/ppl"}
"""Tokens only rise, and perplexity is the loss in other words."""


def _one(metric: str, label: str = "") -> tuple[Line, ...]:
    return (Line(metric, label),)


PANELS = (
    Panel(
        TRAINING,
        "Loss",
        (Line("train/loss", "training", faint=True), Line("val/loss", "validation", points=True)),
        "nats per token",
        log=True,
        wide=True,
    ),
    Panel(TRAINING, "Learning rate", _one("optim/lr"), zero=True),
    Panel(
        TRAINING,
        "Gradient norm",
        (
            Line("optim/grad_norm"),
            Line("optim/student_norm", "student"),
            Line("optim/discriminator_norm", "discriminator"),
        ),
        log=True,
    ),
    Panel(TRAINING, "Bits per byte", (Line("val/bpb", "validation", points=True),), "validation"),
    Panel(TRAINING, "z-loss", _one("train/z_loss"), zero=True),
    Panel(SPEED, "Throughput", _one("perf/tokens_per_s"), "tokens/s", zero=True),
    Panel(SPEED, "Model FLOPs utilisation", _one("perf/mfu"), kind="percent", zero=True),
    Panel(SPEED, "Step time", _one("perf/step_s"), "seconds", zero=True, log=True),
    Panel(SPEED, "GPU utilisation", _one("perf/gpu_utilization"), kind="percent", zero=True),
    Panel(SPEED, "Peak memory", _one("perf/memory_gib"), "GiB so far", zero=True),
    Panel(DISTILLATION, "Student's loss", _one("train/student_loss"), "nats per token"),
    Panel(
        DISTILLATION,
        "Discriminator's loss",
        _one("gad/discriminator_loss"),
        "nats per pair",
        marks=(("ln 2: no difference seen", math.log(2)),),
    ),
    Panel(
        DISTILLATION,
        "Discriminator's accuracy",
        (
            Line("gad/discriminator_accuracy", "training", faint=True),
            Line("val/discriminator_accuracy", "validation", points=True),
        ),
        "share of pairs",
        kind="percent",
    ),
    Panel(
        DISTILLATION,
        "Rewards",
        (Line("gad/teacher_score", "teacher's answers"), Line("gad/student_score", "student's answers")),
        "mean score",
    ),
    Panel(DISTILLATION, "Margin", _one("gad/margin"), "teacher's score less student's"),
    Panel(DISTILLATION, "Spread of rewards", _one("gad/reward_std"), "within a group", zero=True),
    Panel(DISTILLATION, "KL to the reference", _one("gad/kl"), "nats per token", zero=True),
    Panel(DISTILLATION, "Entropy", _one("gad/entropy"), "nats per token", zero=True),
    Panel(
        DISTILLATION,
        "Length of answers",
        (Line("gad/response_length", "student"), Line("gad/teacher_length", "teacher")),
        "tokens",
        zero=True,
    ),
    Panel(DISTILLATION, "Score and length", _one("gad/score_length_correlation"), "correlation"),
    Panel(
        DISTILLATION,
        "Answers cut off or empty",
        (Line("gad/truncated", "cut off"), Line("gad/empty", "empty")),
        kind="percent",
        zero=True,
    ),
    Panel(DISTILLATION, "Groups of equal rewards", _one("gad/collapsed_groups"), kind="percent", zero=True),
    Panel(DISTILLATION, "ROUGE-L", (Line("val/rouge_l", "validation", points=True),), "validation"),
    Panel(
        DISTILLATION,
        "Variety",
        (Line("val/distinct_2", "distinct 2-grams", points=True), Line("val/repetition", "repeated 4-grams", points=True)),
        "validation",
        kind="percent",
        zero=True,
    ),
    Panel(SOURCES, "Passes over each source", (Line("data/epoch/*"),), "epochs", zero=True),
)  # fmt: skip


def draw_panels(
    runs: Sequence[Mapping[str, Columns]],
    names: Sequence[str],
    marks: Mapping[str, Sequence[tuple[str, float]]],
) -> dict[str, Any]:
    """What the page's script draws: {runs, steps, series, charts}, JSON values.

    Args:
        runs: the columns of each run by metric.
        names: of the runs.
        marks: by metric, horizontal lines (label, value) of a single run's chart.
    """
    metrics = list(dict.fromkeys(name for columns in runs for name in columns))
    panels = [found for panel in PANELS if (found := _present(panel, metrics))]
    used = {line.metric for panel in panels for line in panel.lines} | HIDDEN
    others = [name for name in metrics if name not in used][:MOST_OTHERS]
    panels += [Panel(OTHERS, name, _one(name)) for name in others]
    if len(runs) > 1:
        panels = [single for panel in panels for single in _split(panel)]
    table = _Table()
    charts = [_chart(panel, runs, names, marks, table) for panel in panels]
    return {"runs": list(names), "steps": table.steps, "series": table.series, "charts": charts}


def _present(panel: Panel, metrics: Sequence[str]) -> Panel | None:
    lines: list[Line] = []
    for line in panel.lines:
        if line.metric.endswith("*"):
            prefix = line.metric[:-1]
            lines += [Line(name, name.removeprefix(prefix)) for name in metrics if name.startswith(prefix)]
        elif line.metric in metrics:
            lines.append(line)
    return _with_lines(panel, lines) if lines else None


def _split(panel: Panel) -> list[Panel]:
    if len(panel.lines) == 1:
        return [panel]
    named = [(line, f"{panel.title}: {line.label}" if line.label else panel.title) for line in panel.lines]
    return [_with_lines(panel, [line], title) for line, title in named]


def _with_lines(panel: Panel, lines: Sequence[Line], title: str = "") -> Panel:
    wide = panel.wide and not title  # beside each other, for comparison
    return Panel(
        panel.section, title or panel.title, tuple(lines), panel.unit, panel.kind, panel.zero, panel.log, wide, panel.marks
    )  # fmt: skip


def _chart(
    panel: Panel,
    runs: Sequence[Mapping[str, Columns]],
    names: Sequence[str],
    marks: Mapping[str, Sequence[tuple[str, float]]],
    table: _Table,
) -> dict[str, Any]:
    lines = []
    for run, columns in enumerate(runs):
        for i, line in enumerate(panel.lines):
            if line.metric not in columns:
                continue
            label = names[run] if len(runs) > 1 else line.label or panel.title
            colour = (run if len(runs) > 1 else i) % COLOURS
            series = table.add((run, line.metric), columns[line.metric])
            found = {"label": label, "run": run, "colour": colour, "series": series}
            if len(runs) == 1 and line.faint and len(panel.lines) > 1:
                found["faint"] = True
            lines.append({**found, "points": True} if line.points else found)
    found = {"section": panel.section, "title": panel.title, "lines": lines}
    found |= {key: value for key in ("unit", "kind", "zero", "log", "wide") if (value := getattr(panel, key))}
    drawn = [*panel.marks, *(mark for line in panel.lines for mark in marks.get(line.metric, ()))]
    return (
        {**found, "marks": [{"label": label, "value": value} for label, value in drawn]} if drawn else found
    )


class _Table:
    """The series of a page, each once, and the steps that many of them share, once too."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.series: list[dict[str, Any]] = []
        self._of_steps: dict[tuple[int, ...], int] = {}
        self._of_series: dict[tuple[int, str], int] = {}

    def add(self, key: tuple[int, str], columns: Columns) -> int:
        if key not in self._of_series:
            found: dict[str, Any] = columns.to_json()
            steps = tuple(columns.steps)
            if steps not in self._of_steps:
                self._of_steps[steps] = len(self.steps)
                self.steps.append(columns.steps)
            self._of_series[key] = len(self.series)
            self.series.append({**found, "steps": self._of_steps[steps]})
        return self._of_series[key]
