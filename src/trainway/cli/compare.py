"""`trainway compare`: the validations of one or more runs in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainway.cli.terminal import emit, emit_json, emit_table

if TYPE_CHECKING:
    from trainway.gad.compare import PromptAnswers, Validated

Figures = Mapping[str, float]


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    targets: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Runs, or checkpoints in them for one step alone.")
    ],
    samples: Annotated[
        int, typer.Option(min=0, help="Show what was answered to so many prompts, the teacher first.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure.")] = False,
) -> None:
    """The validations of runs, step by step: which checkpoint is worth exporting.

    Example: trainway compare runs/warm-up runs/adversarial --samples 2
    """
    from trainway.gad.compare import compare as compare_runs
    from trainway.gad.compare import compare_samples

    rows = compare_runs(targets)
    answers = compare_samples(targets, samples) if samples else []
    names = _names([row.run for row in rows] + [run for asked in answers for run, _ in asked.students])
    if as_json:
        found = [_as_json(row, names) for row in rows]
        emit_json({"rows": found, "samples": [_asked_as_json(asked, names) for asked in answers]})
        return
    if rows:
        emit_table(*_table(rows, names))
    else:
        emit(f"no validations in {', '.join(map(str, targets))}")
    for asked in answers:
        emit("\n" + _answers_as_text(asked, names))


def _table(rows: Sequence[Validated], names: Mapping[Path, str]) -> tuple[list[list[str]], list[str]]:
    """Cells and head; a column that no row fills is left out."""
    columns: dict[str, list[str]] = {
        "run": [names[row.run] for row in rows] if len(names) > 1 else [],
        "step": [str(row.step) for row in rows],
        "stage": [row.stage for row in rows],
        "marks": [_marks(row) for row in rows],
        **{head: [cell(row.figures) for row in rows] for head, cell in _FIGURES.items()},
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    return [list(cells) for cells in zip(*shown.values(), strict=True)], list(shown)


def _figure(name: str, form: str) -> Callable[[Figures], str]:
    return lambda figures: format(figures[name], form) if name in figures else ""


def _length(figures: Figures) -> str:
    """The student's tokens, and how many times the teacher's that is."""
    if "val/length" not in figures:
        return ""
    teacher = figures.get("val/teacher_length", 0.0)
    share = f" ({figures['val/length'] / teacher:.2f}x)" if teacher > 0 else ""
    return f"{figures['val/length']:.1f}{share}"


_FIGURES: dict[str, Callable[[Figures], str]] = {
    "val/loss": _figure("val/loss", ".4f"),
    "ppl": _figure("val/ppl", ".2f"),
    "bpb": _figure("val/bpb", ".4f"),
    "ROUGE-L": _figure("val/rouge_l", ".4f"),
    "length (of teacher's)": _length,
    "distinct-2": _figure("val/distinct_2", ".4f"),
    "truncated": _figure("val/truncated", ".1%"),
    "D accuracy": _figure("val/discriminator_accuracy", ".1%"),
}


def _marks(row: Validated) -> str:
    marks = [mark for mark, on in (("latest", row.is_latest), ("best", row.is_best)) if on]
    return " ".join(marks or (["saved"] if row.saved else []))


def _names(runs: Sequence[Path]) -> dict[Path, str]:
    """Each run by the name of its directory, or as it was given where two have the same."""
    runs = list(dict.fromkeys(runs))
    named = [run.resolve().name for run in runs]
    return {run: name if named.count(name) == 1 else str(run) for run, name in zip(runs, named, strict=True)}


def _as_json(row: Validated, names: Mapping[Path, str]) -> dict[str, Any]:
    return {
        "run": names[row.run],
        "path": row.run,
        "step": row.step,
        "stage": row.stage or None,
        "saved": row.saved,
        "latest": row.is_latest,
        "best": row.is_best,
        "figures": row.figures,
    }


def _asked_as_json(asked: PromptAnswers, names: Mapping[Path, str]) -> dict[str, Any]:
    students = [
        {
            "run": names[run],
            "step": sample.step,
            "text": sample.student,
            "truncated": sample.truncated,
            "score": sample.score,
            "teacher_score": sample.teacher_score,
        }
        for run, sample in asked.students
    ]
    return {"prompt": asked.prompt, "teacher": asked.teacher, "students": students}


def _answers_as_text(asked: PromptAnswers, names: Mapping[Path, str]) -> str:
    from trainway.data.printable import printable

    said = [("teacher", asked.teacher)]
    for run, sample in asked.students:
        who = f"{names[run]} step {sample.step}" if len(names) > 1 else f"step {sample.step}"
        score = "" if sample.score is None else f" (score {sample.score:.3f})"
        said.append((who + score, sample.student + (" [cut off]" if sample.truncated else "")))
    return "\n".join([f"> {printable(asked.prompt)}", *(f"[{who}]\n{printable(text)}" for who, text in said)])
