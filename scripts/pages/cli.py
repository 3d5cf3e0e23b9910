"""docs/cli.md: every verb with its arguments, options and example, from the program itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from pages.tables import cell
from trainway.cli.app import app

OPENING = """# Every verb

This page is made from the program by `python scripts/references.py`; `trainway VERB --help` says the same.

One program, `trainway` (also `python -m trainway`). `--debug` may stand anywhere and shows tracebacks. Exit codes: 0 done · 1 internal error ·
2 configuration or arguments · 3 data · 4 environment · 75 stopped on request, start again to go on.
"""


def render(page: str = "") -> str:
    program = typer.main.get_command(app)
    context = typer.Context(program, info_name="trainway")
    return "\n".join([OPENING, *_verbs(program, context, "trainway")]).rstrip() + "\n"


def _verbs(group: Any, context: typer.Context, path: str) -> Iterator[str]:
    for name in sorted(group.commands):
        command = group.commands[name]
        if command.hidden:
            continue
        inner = typer.Context(command, info_name=name, parent=context)
        if getattr(command, "commands", None):
            yield from _one(command, inner, f"{path} {name}") if command.params else ()
            yield from _verbs(command, inner, f"{path} {name}")
        else:
            yield from _one(command, inner, f"{path} {name}")


def _one(command: Any, context: typer.Context, path: str) -> Iterator[str]:
    about, _, example = (command.help or "").partition("Example:")
    words = " ".join(command.collect_usage_pieces(context))
    yield f"## {path}\n"
    yield f"{_prose(about)}\n"
    yield f"```text\n{path} {words}\n```\n"
    if example:
        yield f"```bash\n{_prose(example)}\n```\n"
    records = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    rows = [(names, text) for names, text in records if "--help" not in names]
    if rows:
        yield "| argument or option | meaning |\n|---|---|"
        yield from (f"| `{cell(names)}` | {cell(text)} |" for names, text in rows)
        yield ""


def _prose(text: str) -> str:
    """Paragraphs on a line each; typer's marks of line breaks are not for people."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\b", "").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
