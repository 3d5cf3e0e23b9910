"""Runs beside each other: their results, the settings in which they differ, and their last answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainway.report import sections
from trainway.report.facts import RunFacts
from trainway.report.sections import Table, as_text
from trainway.report.wording import count, dollars, duration, loss, share

PLACES = ("name", "run_dir", "runs_dir", "description", "data.store_dir")
"""Settings that differ between any two runs, and say nothing of what was trained."""

_Row = tuple[str, Callable[[RunFacts], float | None], Callable[[float], str]]
_RESULTS: tuple[_Row, ...] = (
    ("validation loss", lambda run: run.last("val/loss"), loss),
    ("best validation loss", lambda run: sections.best_loss(run)[0], loss),
    ("training loss", lambda run: run.last("train/loss"), loss),
    ("ROUGE-L", lambda run: run.last("val/rouge_l"), loss),
    ("steps", lambda run: float(run.step), count),
    ("tokens", sections.tokens, count),
    ("time", sections.seconds, duration),
    ("tokens per second", lambda run: sections.mean(run, "perf/tokens_per_s"), count),
    ("MFU", lambda run: sections.mean(run, "perf/mfu"), share),
    ("peak memory, GiB", sections.peak_gib, lambda value: f"{value:.2f}"),
    ("cost", sections.cost, dollars),
    ("parameters", lambda run: run.number("result", "parameters"), count),
)


def results(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    """A row for each run: a table reads better down than across when names are long."""
    columns = {head: [value(run) for run in runs] for head, value, _ in _RESULTS}
    kept = [(head, form) for head, _, form in _RESULTS if any(value is not None for value in columns[head])]
    rows = [
        [name, run.state, *(_cell(columns[head][i], form) for head, form in kept)]
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return Table(("run", "state", *(head for head, _ in kept)), rows, range(2, len(kept) + 2))


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def differences(runs: Sequence[RunFacts], names: Sequence[str]) -> Table | None:
    """The settings that are not the same in all runs."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if key not in PLACES]
    rows = [[key, *(_setting(run, key) for run in runs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(("setting", *names), rows) if rows else None


def _setting(run: RunFacts, key: str) -> str:
    return as_text(run.config[key]) if key in run.config else ""


def last_answers(runs: Sequence[RunFacts], names: Sequence[str]) -> list[dict[str, Any]]:
    """What each run wrote last after the prompts that more than one was given."""
    found: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        reference_name = "teacher" if run.config.get("recipe") == "gad" else "reference"
        for item in run.asked:
            title = " ".join(item.prompt.split())[:90] or "(an empty prompt)"
            entry = found.setdefault(
                item.prompt,
                {"title": title, "prompt": item.prompt, "reference": item.reference, "reference_name": reference_name, "answers": []},
            )  # fmt: skip
            newest = item.spread()[0]
            note = "best weights" if newest.best else f"step {newest.step:,}"
            entry["answers"].append(
                {"label": name, "note": note, "text": newest.text if newest.text.strip() else "(nothing)"}
            )
    return [entry for entry in found.values() if len(entry["answers"]) > 1]
