"""`trainway report`: a run, or several beside each other, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.terminal import emit, emit_json


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write: report.html in the run's directory, or comparison.html here for several runs.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write one HTML file with the charts, samples, settings and figures of a run; several runs are compared.

    Example: trainway report runs/a runs/b --out a-and-b.html
    """
    from trainway.report.page import write_report

    written = write_report(runs, out)
    if as_json:
        read = [{"path": run.run.path, "state": run.state, "step": run.step} for run in written.runs]
        emit_json({"path": written.path, "bytes": written.bytes, "runs": read})
    else:
        emit(str(written.path))
