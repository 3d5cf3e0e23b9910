"""`trainway eval`: what trained models are worth, on text and on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainway.cli.terminal import emit, emit_json, emit_table, is_main_rank, progress_bar

if TYPE_CHECKING:
    from trainway.training.evaluations import Evaluation


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    targets: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="Runs, checkpoints, or model directories.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Files to evaluate on; empty: the run's validation split.")
    ] = None,
    which: Annotated[
        str, typer.Option(help="Of each run: best, latest, all, or steps such as 500,1000.")
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, such as arc_easy,hellaswag.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Worked examples in each prompt.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A directory with task definitions of your own.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts to continue, one a line.")] = None,
    count: Annotated[
        Literal["auto", "text", "answers"],
        typer.Option(help="What counts: all of a text, or the answers of conversations. auto: as trained."),
    ] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=0, help="Read so many tokens of each source; 0: all.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a row; empty: as trained.")] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Arithmetic. auto: as in training.")
    ] = "auto",
    batch_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows at once; empty: as many as fit.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all of it to this JSON file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every figure.")] = False,
) -> None:
    """Loss, perplexity and bits per byte on held-out text, scores on tasks, continued prompts; several in one table.

    Example: trainway eval runs/a runs/b --which all --data held-out.jsonl
    """
    from trainway.cli.arguments import parse_checkpoints, read_lines
    from trainway.recipes.evaluation import Asked, evaluate_models
    from trainway.recipes.lm_eval import Tasks

    wanted = Tasks(_words(tasks), limit, num_fewshot, include_path) if _words(tasks) else None
    asked = Asked(
        data=tuple(data or ()),
        prompts=tuple(read_lines(prompts)) if prompts else (),
        tasks=wanted,
        count=count,
        max_tokens=max_tokens,
        seq_len=seq_len,
        precision=precision,
        batch_rows=batch_rows,
    )
    with progress_bar() as progress:
        found = evaluate_models(targets, asked, which=parse_checkpoints(which), out=out, progress=progress)
    if not is_main_rank():
        return
    if as_json:
        emit_json({"models": [one.to_json() for one in found]})
    else:
        _show(found)


def _show(found: Sequence[Evaluation]) -> None:
    from trainway.data.printable import printable

    rows = [cells for one in found for cells in _rows(one)]
    if rows:
        head = (
            "model",
            "step",
            "loss (95 %)",
            "perplexity",
            "bits per byte",
            "vs first",
            "tokens",
            "documents",
        )
        columns = [
            (name, cells) for name, cells in zip(head, zip(*rows, strict=True), strict=True) if any(cells)
        ]
        emit_table(
            list(zip(*(cells for _, cells in columns), strict=True)), head=[name for name, _ in columns]
        )
    scores = [cells for one in found for cells in _scores(one)]
    if scores:
        emit_table(scores, head=("model", "step", "task", "metric", "value", "stderr", "examples"))
    for one in found:
        for sample in one.samples:
            emit(f"\n> {printable(sample['prompt'])}\n[{one.model}]\n{printable(sample['text'])}")
    emit("\n".join(dict.fromkeys(_how(one) for one in found)))


def _rows(one: Evaluation) -> Iterator[tuple[str, ...]]:
    """A row of the model, and one for each of several sources."""
    step = "" if one.step is None else str(one.step)
    for name, figures in [(one.model, one.figures)] * bool(one.figures) + [
        (f"  {source}", figures) for source, figures in one.sources.items()
    ]:
        against = one.difference if figures is one.figures else {}
        yield (
            name,
            step,
            _with_interval(figures, "val/loss"),
            _number(figures["val/ppl"], ".4g"),
            _number(figures["val/bpb"], ".4f"),
            _against(against),
            _number(figures["val/tokens"], ",.0f"),
            _number(figures["val/documents"], ",.0f"),
        )


def _scores(one: Evaluation) -> Iterator[tuple[str, ...]]:
    step = "" if one.step is None else str(one.step)
    for task, metrics in one.tasks.items():
        for name, value in metrics.items():
            if name == "num_samples" or name.endswith("_stderr"):
                continue
            error, examples = metrics.get(f"{name}_stderr"), metrics.get("num_samples")
            yield (
                one.model,
                step,
                task,
                name,
                _number(value, ".4f"),
                _number(error, ".4f"),
                _number(examples, ",.0f"),
            )


def _how(one: Evaluation) -> str:
    settings = one.settings
    base = f"; adapter on {settings['base']}" if settings.get("base") else ""
    counted = "all tokens" if settings["counted"] == "text" else f"answers ({settings['counted']})"
    return (
        f"{settings['precision']} arithmetic, {settings['weights']} weights, {settings['device']}; {counted}, "
        f"rows of {settings['seq_len']}, {settings['rows']} at once{base}"
    )


def _with_interval(figures: dict[str, float | None], name: str) -> str:
    value, high = figures[name], figures[f"{name}_high"]
    if value is None or high is None:
        return _number(value, ".4f")
    return f"{value:.4f} ± {high - value:.4f}"


def _against(found: dict[str, float | None]) -> str:
    if not found or found["bpb"] is None:
        return ""
    high = found["high"]
    return f"{found['bpb']:+.4f}" + ("" if high is None else f" ± {high - found['bpb']:.4f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
