"""`trainway runs` and `trainway checkpoints`: what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.terminal import emit, emit_json, emit_table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    app.command("runs")(runs)
    app.command("checkpoints")(checkpoints)


def runs(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Directory of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """The runs in a directory, oldest first, with state, step and loss.

    Example: trainway runs /workspace/runs
    """
    import dataclasses

    from trainway.training.runs import list_runs

    found = list_runs(directory)
    if as_json:
        emit_json([dataclasses.asdict(run) for run in found])
        return
    if not found:
        emit(f"no runs in {directory}")
        return
    rows = [
        (run.state, str(run.step), "" if run.val_loss is None else f"{run.val_loss:.4f}", run.time, run.name)
        for run in found
    ]
    emit_table(rows, head=("state", "step", "val/loss", "time", "name"))


def checkpoints(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file; exit code 3 when one is damaged.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """The checkpoints of a run.

    Example: trainway checkpoints runs/my-run --verify
    """
    from trainway.checkpoint.store import CheckpointStore
    from trainway.errors import ExitCode
    from trainway.run_dir import RunDir

    store = CheckpointStore(RunDir(run).checkpoints, keep_last=1)
    found = store.describe()
    problems = {info.step: store.verify(info.step) for info in found} if verify else {}
    if as_json:
        emit_json(
            [
                {
                    "step": info.step,
                    "path": info.path,
                    "size_bytes": info.size_bytes,
                    "latest": info.is_latest,
                    "best": info.is_best,
                    "info": info.info,
                    **({"problems": problems[info.step]} if verify else {}),
                }
                for info in found
            ]
        )
    elif not found:
        emit(f"no checkpoints in {run}")
    else:
        rows = []
        for info in found:
            marks = " ".join(mark for mark, on in (("latest", info.is_latest), ("best", info.is_best)) if on)
            state = "; ".join(problems[info.step]) or "intact" if verify else ""
            rows.append((str(info.step), f"{info.size_bytes / 2**20:,.1f} MiB", marks, state))
        emit_table(rows, head=("step", "size", "marks", "state" if verify else ""))
    return ExitCode.DATA if any(problems.values()) else ExitCode.DONE
