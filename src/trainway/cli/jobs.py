"""`trainway up`, `status`, `logs`, `ssh`, `tunnel`, `stop`, `down`, `cost`, `reap`: jobs on any machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trainway.cli.arguments import PassesOn
from trainway.cli.terminal import emit, emit_json, emit_table
from trainway.errors import ConfigError, ExitCode

JobWord = Annotated[
    str, typer.Argument(metavar="JOB", help="The job's name, or its file.", show_default=False)
]
JobWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[JOB]...", help="Names or files of jobs; none means all.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("ssh", cls=PassesOn)(ssh)
    app.command("tunnel")(tunnel)
    app.command("stop")(stop)
    app.command("down")(down)
    app.command("cost")(cost)
    app.command("reap")(reap)


def up(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over it: limits.hours=2", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact request or manifests; send nothing.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="kubernetes: write the manifests for kubectl and Kustomize; create nothing."
        ),
    ] = None,
    trainjob: Annotated[
        bool, typer.Option("--trainjob", help="With --export: a TrainJob of Kubeflow Trainer.")
    ] = False,
    yes: Yes = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Then show the log.")] = False,
    as_json: AsJson = False,
) -> int:
    """Start a job: plan it, ask, rent, upload, train. Called again, it goes on with the job that is up.

    Example: trainway up job.yaml limits.dollars=50
    """
    from trainway.jobs import verbs

    if dry_run:
        _print_request(verbs.dry_run(job, words or [], say=_say), as_json)
        return ExitCode.DONE
    if export is not None:
        for path in verbs.export_job(job, export, words or [], trainjob=trainjob):
            emit(str(path))
        return ExitCode.DONE
    record = verbs.up(job, words or [], confirm=_asker(yes), say=_say)
    if record is None:
        emit("nothing was started")
        return ExitCode.DONE
    if as_json:
        import dataclasses

        emit_json(dataclasses.asdict(record))
    if follow:
        _follow(record.name)
    return ExitCode.DONE


def status(jobs: JobWords = None, as_json: AsJson = False) -> int:
    """Where jobs are: the machine, the stage, the step, the dollars.

    Example: trainway status my-job
    """
    from trainway.jobs.status_text import status_json, status_rows
    from trainway.jobs.verbs import status as look

    found = look(jobs or [])
    if as_json:
        emit_json([status_json(seen) for seen in found])
    elif not found:
        emit("no job is up")
    else:
        emit_table(*status_rows(found))
    return ExitCode.ENVIRONMENT if any(seen.problem for seen in found) else ExitCode.DONE


def logs(
    job: JobWord,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", help="Only the last lines.", min=0)] = None,
) -> None:
    """What the job says, all nodes of it.

    Example: trainway logs my-job --follow
    """
    _follow(job, follow=follow, tail=tail)


def ssh(context: typer.Context, job: JobWord) -> int:
    """A shell on the job's machine, or one command after `--`.

    Example: trainway ssh my-job -- nvidia-smi
    """
    from trainway.jobs import verbs

    return verbs.ssh(job, context.obj or [])


def tunnel(
    job: JobWord,
    ports: Annotated[
        list[str] | None, typer.Argument(metavar="[PORT]...", help="PORT or HERE:THERE; none means 6006.")
    ] = None,
) -> int:
    """Make ports of the job reachable on 127.0.0.1: TensorBoard's 6006, or others. Ctrl-C ends it.

    Example: trainway tunnel my-job 6006
    """
    from trainway.jobs import verbs

    return verbs.tunnel(job, ports or [], say=_say)


def stop(job: JobWord) -> None:
    """Save and stop the training, and stop paying for its GPUs; `up` goes on from there.

    Example: trainway stop my-job
    """
    from trainway.jobs import verbs

    verbs.stop(job, say=_say)


def down(
    job: JobWord,
    forget: Annotated[
        bool,
        typer.Option("--forget", help="The machine is gone and cannot be asked: only note that it ended."),
    ] = False,
) -> None:
    """End the job's machine and remove what was made for it, but its volume.

    Example: trainway down my-job
    """
    from trainway.jobs import verbs

    (verbs.forget if forget else verbs.down)(job, say=_say)


def cost(jobs: JobWords = None, as_json: AsJson = False) -> None:
    """What jobs have cost: by the clock, and by the provider's bill.

    Example: trainway cost my-job
    """
    import dataclasses

    from trainway.jobs.verbs import cost as ask

    found = ask(jobs or [])
    if as_json:
        emit_json([{"job": record.name, **dataclasses.asdict(item)} for record, item in found])
        return
    if not found:
        emit("no jobs")
        return
    rows = [
        (
            record.name,
            record.target,
            f"{item.hours:.2f}",
            f"${item.estimated:,.2f}",
            "" if item.billed is None else f"${item.billed:,.2f}",
            "" if record.planned_dollars is None else f"${record.planned_dollars:,.2f}",
            item.note,
        )
        for record, item in found
    ]
    emit_table(rows, head=("job", "target", "hours", "estimated", "billed", "planned", ""))


def reap(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...", help="runpod, kubernetes, ssh, local; none means those in use."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them; exit code 4 if any.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    """Find machines that were started and that no job needs, and end them. What others have started is left alone.

    Example: trainway reap --yes
    """
    import dataclasses

    from trainway.jobs import verbs

    confirm = (lambda text: False) if dry_run else _asker(yes)
    found = verbs.reap(verbs.reap_targets(targets or []), confirm=confirm, say=_say)
    left = [stray for item in found for stray in item.strays if stray.id not in item.ended]
    if as_json:
        emit_json([dataclasses.asdict(item) for item in found])
    else:
        rows = [
            (item.target, stray.id, stray.name, stray.state, f"${stray.dollars_per_hour:.2f}/h", stray.why)
            for item in found
            for stray in item.strays
            if stray.id not in item.ended
        ]
        if rows:
            emit_table(rows)
        for item in found:
            if item.problem:
                emit(f"{item.target}: {item.problem}")
        if not left and not any(item.problem for item in found):
            emit("nothing is left running")
    return ExitCode.ENVIRONMENT if left or any(item.problem for item in found) else ExitCode.DONE


def _follow(job: str, *, follow: bool = True, tail: int | None = None) -> None:
    from trainway.jobs import verbs

    for line in verbs.logs(job, follow=follow, tail=tail):
        emit(line)


def _print_request(request: Any, as_json: bool) -> None:
    if as_json or not isinstance(request, list):
        emit_json(request)
        return
    import yaml

    emit(yaml.safe_dump_all(request, sort_keys=False, allow_unicode=True).rstrip())


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _asker(yes: bool) -> Any:
    """Shows the text and asks on a terminal; where nobody can answer, --yes is needed."""
    import sys

    def confirm(text: str) -> bool:
        _say(text)
        if yes:
            return True
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here", "standard input is no terminal", "add --yes")
        return typer.confirm("Go on?", err=True)

    return confirm
