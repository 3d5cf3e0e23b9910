"""`trainway doctor`: whether this machine, and a run that is meant for it, are ready."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from trainway.cli.arguments import OPEN_ENDED, split_arguments
from trainway.cli.terminal import emit, emit_json, progress_bar

if TYPE_CHECKING:
    from trainway.doctor.findings import Finding


def register(app: typer.Typer) -> None:
    app.command("doctor", context_settings=OPEN_ENDED)(doctor)


def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="The run that is meant for this machine, as for `trainway train`; left out: the machine alone, or RUN_CONFIG.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    paid: Annotated[
        bool, typer.Option("--paid", help="The machine is rented: what lies on its own disk is lost with it.")
    ] = False,
    git: Annotated[bool, typer.Option("--git", help="Look for Git and an SSH key as well.")] = False,
) -> int:
    """Look at GPUs, libraries, disks, network, logins and data; exit code 4 when something would end the run.

    Example: trainway doctor my.yaml run_dir=/workspace/runs/my-run --paid
    """
    from dataclasses import asdict

    from trainway.doctor.checks import examine, exit_code

    source, settings = split_arguments(words or []) if words or os.environ.get("RUN_CONFIG") else (None, [])
    with progress_bar() as progress:
        found = examine(
            source,
            settings,
            paid=paid,
            git=git,
            progress=lambda name, done, total: progress("looking", done, total),
        )
    if as_json:
        emit_json([asdict(finding) for finding in found])
    else:
        emit("\n".join(line for finding in found for line in _lines(finding)))
        emit(_summary(found))
    return exit_code(found)


def _lines(finding: Finding) -> list[str]:
    lines = [f"{finding.level:8} {finding.name:17} {finding.what}"]
    if finding.level != "ok":
        lines += [
            f"{'':8} {label}: {text}" for label, text in (("why", finding.why), ("fix", finding.fix)) if text
        ]
    return lines


def _summary(found: list[Finding]) -> str:
    counts = {
        level: sum(finding.level == level for finding in found) for level in ("failure", "warning", "ok")
    }
    parts = [
        f"{counts['failure']} failure{'s' * (counts['failure'] != 1)}",
        f"{counts['warning']} warning{'s' * (counts['warning'] != 1)}",
        f"{counts['ok']} ok",
    ]
    return ", ".join(parts)
