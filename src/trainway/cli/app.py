"""The program `trainway`: its verbs, and how an error ends it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from trainway import __version__
from trainway.cli import (
    bench,
    board,
    bootstrap,
    compare,
    config,
    data,
    doctor,
    evaluate,
    jobs,
    model,
    orchestrate,
    plan,
    quickstart,
    release,
    report,
    runs,
    serve,
    smoke,
    sync,
    train,
)
from trainway.cli.terminal import emit, is_main_rank, print_error
from trainway.errors import ExitCode, PeerFailed, Stopped, UserError

DEBUG_VARIABLE = "TRAINWAY_DEBUG"

app = typer.Typer(
    name="trainway",
    help="Take a language model the whole way: data, tokenizer, training, evaluation, release.",
    epilog="Start with: trainway quickstart",
    no_args_is_help=True,
    add_completion=False,
    # plain help starts in a third of the time, and reads well in a pipe
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    quickstart,
    config,
    plan,
    doctor,
    smoke,
    bench,
    data,
    orchestrate,
    train,
    jobs,
    bootstrap,
    evaluate,
    model,
    release,
    serve,
    runs,
    report,
    compare,
    board,
    sync,
):
    group.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; see `trainway.errors.ExitCode`. Nothing is raised."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = words[: words.index("--")] if "--" in words else words
    if "--debug" not in own:
        return _run(words, debug=DEBUG_VARIABLE in os.environ)
    words.remove("--debug")
    os.environ[DEBUG_VARIABLE] = "1"  # for the ranks of a run, too
    try:
        return _run(words, debug=True)
    finally:
        del os.environ[DEBUG_VARIABLE]


def _run(words: list[str], *, debug: bool) -> int:
    try:
        result = typer.main.get_command(app).main(args=words, prog_name="trainway", standalone_mode=False)
        return result if isinstance(result, int) else ExitCode.DONE
    except UserError as error:
        _trace(debug)
        print_error(error)
        return error.code
    except PeerFailed:
        return ExitCode.INTERNAL
    except Stopped as stopped:
        if is_main_rank():
            print(f"{stopped}; run the same command again to go on", file=sys.stderr)
        return ExitCode.STOPPED
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
        else:
            print_error(_usage_error(error))
        return ExitCode.CONFIG
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.INTERNAL
    except Exception as error:  # the last line of defence: one line for the user, the traceback on request
        _trace(debug)
        hint = "" if debug else " (run again with --debug for the traceback)"
        print(f"internal error: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return ExitCode.INTERNAL


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda on: _version(on)),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """`main` takes --debug out before it gets here, so that it may stand after the verb too."""


def _version(wanted: bool) -> None:
    if wanted:
        emit(f"trainway {__version__}")
        raise typer.Exit()


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _usage_error(error: typer.TyperException) -> UserError:
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "trainway"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return UserError(message, "", f"`{verb} --help` shows how it is used")
