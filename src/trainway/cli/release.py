"""`trainway release`: a run's model on the Hugging Face Hub, complete and tagged."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainway.cli.terminal import emit, emit_json

if TYPE_CHECKING:
    from trainway.release.publish import Released


def register(app: typer.Typer) -> None:
    app.command("release")(release)


def release(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    repo: Annotated[
        str | None, typer.Option(help="OWNER/NAME on the Hub; empty: release.repo of the run.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag; empty: release.tag of the run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every file and the card; nothing leaves.")
    ] = False,
    which: Annotated[str | None, typer.Option(help="best, latest, or a step.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA run's adapter into its base.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A repository that everyone may read.")] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="As the Hub names it: apache-2.0.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the run had it in a directory.")
    ] = None,
    cost: Annotated[
        float | None, typer.Option(min=0.0, help="Dollars that the training has cost, for the card.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload a run's model to the Hugging Face Hub, and tag it when all is there. Again: completes what broke off.

    Example: trainway release runs/my-run --repo ada/my-model --tag v0.1 --dry-run
    """
    from trainway.cli.arguments import parse_which
    from trainway.release.publish import release as release_run

    done = release_run(
        run,
        dry_run=dry_run,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        repo=repo,
        tag=tag,
        which=None if which is None else parse_which(which),
        merge=merge or None,
        private=False if public else None,
        licence=licence,
        base=base,
        cost=cost,
    )
    if as_json:
        emit_json(asdict(done))
    else:
        emit(_shown(done))


def _shown(done: Released) -> str:
    from trainway.data.printable import printable

    lines = []
    if done.state == "dry run":
        lines += [f"{file.sha256}  {file.size:>14,}  {file.path}" for file in done.files]
        lines += [f"left out: {printable(one.path)} ({one.reason})" for one in done.left]
        lines += ["", "README.md:", *(f"  {line}" for line in done.card.splitlines()), ""]
        where = "private" if done.private else "public"
        size = sum(file.size for file in done.files)
        lines.append(
            f"would go to {done.url} ({where}), tag {done.tag}: "
            f"{len(done.files)} files, {size:,} bytes, of step {done.step}"
        )
        return "\n".join(lines)
    lines += [f"left out: {printable(one.path)} ({one.reason})" for one in done.left]
    if done.state == "unchanged":
        lines.append(f"nothing to do: {done.repo} holds all of it")
    lines.append(f"ok: {done.url}")
    lines.append(f"revision: {done.revision}")
    return "\n".join(lines)
