"""What the command line writes: text, tables and JSON to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from trainway.errors import UserError


def emit(text: str) -> None:
    """Print a text. Ends the program quietly when the reader has gone, as in `trainway ... | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # what is still buffered would fail once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def emit_json(value: Any) -> None:
    """Print a value as indented JSON; paths become text."""
    emit(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def emit_table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
    """Print rows in aligned columns."""
    rows = [head, *rows] if head else rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    emit("\n".join(line.rstrip() for line in lines))


def is_terminal() -> bool:
    """True when a person reads standard output."""
    return sys.stdout.isatty()


def is_main_rank() -> bool:
    """True in the process that speaks for a run: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_error(error: UserError) -> None:
    """The three lines of an error that the user can cure; one line on the ranks that say it after rank 0."""
    if not is_main_rank():
        print(f"rank {os.environ['RANK']}: {error.what}", file=sys.stderr)
        return
    print(error.lines, file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback `(what, done, total)` that shows a bar for each `what`, taken away when all are full; silent when
    nobody watches."""
    if not sys.stderr.isatty() or not is_main_rank():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=Console(stderr=True), transient=True)

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.start()
        bars.update(tasks[what], completed=done, total=total)
        if bars.finished:
            bars.stop()  # training has a bar of its own, and a terminal shows one at a time

    try:
        yield show
    finally:
        bars.stop()
