"""`trainway runs` and `trainway checkpoints`: what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from trainway.cli.terminal import emit, emit_json, emit_table

if TYPE_CHECKING:
    from trainway.tracking.sync import Synced


class _ListsByDefault(TyperGroup):
    """`runs [DIR]` lists; a directory that is called like a verb is written ./sync."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [LIST, *args]
        return super().parse_args(ctx, args)


LIST = "list"
runs_app = typer.Typer(
    cls=_ListsByDefault,
    help="List the runs in a directory (`runs [DIR]`), or bring their trackers up to date (`runs sync`).",
    epilog="Example: trainway runs /workspace/runs",
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    app.add_typer(runs_app, name="runs")
    app.command("checkpoints")(checkpoints)


@runs_app.command(LIST)
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


@runs_app.command("sync")
def sync(
    names: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Run directories; none: every run in ./runs.", show_default=False),
    ] = None,
    to: Annotated[
        str, typer.Option(help="wandb, mlflow, trackio, with commas; empty: those that each run reports to.")
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Bring trackers up to date from metrics.jsonl: what they lack is sent, what they have is not sent again.

    Example: trainway runs sync runs/my-run --to mlflow,wandb
    """
    import dataclasses

    from trainway.errors import ExitCode
    from trainway.tracking.sync import sync_runs

    def show(synced: Synced) -> None:
        if not as_json:
            emit(_sentence(synced))

    found = sync_runs(names or [], [word.strip() for word in to.split(",") if word.strip()], report=show)
    if as_json:
        emit_json([dataclasses.asdict(synced) for synced in found])
    elif not found:
        emit("no run reports to a tracker; --to names one")
    return ExitCode.ENVIRONMENT if any(synced.state == "lost" for synced in found) else ExitCode.DONE


def _sentence(synced: Synced) -> str:
    start = f"{synced.run}: {synced.tracker}"
    match synced.state:
        case "complete" if synced.steps_to is None:
            return f"{start} has everything ({synced.where})"
        case "complete":
            return f"{start} is complete, sent up to step {synced.steps_to} ({synced.where})"
        case "busy":
            return f"{start} is being fed by the run itself"
    return f"{start} is not complete: {synced.why}"


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
