"""`trainway compare`: the checkpoints of one or more runs in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainway.cli.terminal import emit, emit_json, emit_table

if TYPE_CHECKING:
    from trainway.report.compare import PromptAnswers, Validated

Figures = Mapping[str, float]


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    targets: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Runs, or checkpoints in them for one step alone.")
    ],
    sort: Annotated[
        str,
        typer.Option(
            help="Best first by a figure: loss, bpb, arc_easy/acc, hours...; empty: by run and step."
        ),
    ] = "",
    gpu_price: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Of one GPU for an hour: fills in the dollars.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Show what was answered to so many prompts, the data's answer first.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure.")] = False,
) -> None:
    """Checkpoints step by step, of any recipe: losses, scores, tokens, hours, and the settings that differ.

    Example: trainway compare runs/warm-up runs/adversarial --sort loss --samples 2
    """
    from trainway.report.compare import compare as compare_runs
    from trainway.report.compare import compare_samples, compare_settings, ranked

    rows = compare_runs(targets, gpu_price=gpu_price)
    rows = ranked(rows, sort) if sort and rows else rows
    answers = compare_samples(targets, samples) if samples else []
    settings = compare_settings(targets)
    named = [run for values in settings.values() for run in values]
    names = _names([row.run for row in rows] + [run for asked in answers for run, _ in asked.answers] + named)
    if as_json:
        emit_json(
            {
                "rows": [_as_json(row, names) for row in rows],
                "settings": {
                    key: {names[run]: value for run, value in values.items()}
                    for key, values in settings.items()
                },
                "samples": [_asked_as_json(asked, names) for asked in answers],
            }
        )
        return
    if rows:
        emit_table(*_table(rows, names))
    else:
        emit(f"no validations in {', '.join(map(str, targets))}")
    if settings:
        emit("\nsettings that differ:")
        emit_table(
            [(key, *map(_setting, values.values())) for key, values in settings.items()],
            head=("", *(names[run] for run in next(iter(settings.values())))),
        )
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
        **{
            _head(name): [_figure(name, ".4f")(row.figures) for row in rows]
            for name in dict.fromkeys(name for row in rows for name in _measured(row.figures))
        },
        "tokens": ["" if row.tokens is None else f"{row.tokens:,}" for row in rows],
        "hours": ["" if row.hours is None else f"{row.hours:.2f}" for row in rows],
        "dollars": ["" if row.dollars is None else f"{row.dollars:,.2f}" for row in rows],
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    return [list(cells) for cells in zip(*shown.values(), strict=True)], list(shown)


def _measured(figures: Figures) -> list[str]:
    """What `trainway eval` has found on tasks, of each the metric that is usually quoted, and on files."""
    found: dict[str, list[str]] = {}
    for name in figures:
        what, slash, metric = name.partition("/")
        if slash and what != "val" and not metric.endswith(("_stderr", "num_samples", "_low", "_high")):
            found.setdefault(what, []).append(metric)
    shown = []
    for what, metrics in found.items():
        quoted = [metric for metric in _QUOTED if metric in metrics] or metrics
        shown += [f"{what}/{metric}" for metric in (quoted if "val/loss" in metrics else quoted[:1])]
    return shown


_QUOTED = ("val/loss", "val/bpb", "acc_norm", "acc", "exact_match", "exact_match[strict-match]")


def _head(name: str) -> str:
    """`held-out.jsonl val/loss`, `arc_easy acc_norm`."""
    return name.replace("/", " ", 1)


def _setting(value: Any) -> str:
    from trainway.data.printable import printable

    return "-" if value is None else printable(str(value))


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
        "tokens": row.tokens,
        "hours": row.hours,
        "dollars": row.dollars,
        "figures": row.figures,
    }


def _asked_as_json(asked: PromptAnswers, names: Mapping[Path, str]) -> dict[str, Any]:
    answers = [
        {
            "run": names[run],
            "step": answer.step,
            "best": answer.best,
            "text": answer.text,
            "truncated": answer.truncated,
            "score": answer.score,
            "teacher_score": answer.teacher_score,
        }
        for run, answer in asked.answers
    ]
    return {
        "prompt": asked.prompt,
        "reference": asked.reference,
        "by_teacher": asked.by_teacher,
        "answers": answers,
    }


def _answers_as_text(asked: PromptAnswers, names: Mapping[Path, str]) -> str:
    from trainway.data.printable import printable

    said = []
    if asked.reference is not None:
        said.append(("teacher" if asked.by_teacher else "reference", asked.reference))
    for run, answer in asked.answers:
        who = f"{names[run]} step {answer.step}" if len(names) > 1 else f"step {answer.step}"
        who += " best" * answer.best
        score = "" if answer.score is None else f" (score {answer.score:.3f})"
        said.append((who + score, answer.text + (" [cut off]" if answer.truncated else "")))
    return "\n".join([f"> {printable(asked.prompt)}", *(f"[{who}]\n{printable(text)}" for who, text in said)])
