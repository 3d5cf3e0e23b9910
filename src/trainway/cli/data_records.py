"""`trainway data validate|convert|export|stats|inspect`: rows checked, converted, fetched, measured, shown."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainway.cli.row_options import (
    AnyKind,
    AsJson,
    ChatTemplateName,
    CompletionField,
    ContentField,
    Dedup,
    Files,
    Force,
    Kind,
    MaxLength,
    MaxMib,
    MessagesField,
    MessagesKey,
    OneFile,
    PromptField,
    QuarantineFile,
    Shape,
    TeacherField,
    TextField,
    TokenizerPath,
    TrainOnChoice,
    TreePaths,
    field_names,
    require_tokenizer,
    row_config,
)
from trainway.cli.terminal import emit, emit_json, emit_table, progress_bar
from trainway.errors import ExitCode

if TYPE_CHECKING:
    from trainway.data.rows import BadRecord
    from trainway.data.stats import Stats
    from trainway.data.validate import Validation

LISTED_IN_JSON = 10_000
BAR = 40
"""Characters of the longest bar of a histogram."""


def register(data_app: typer.Typer) -> None:
    for verb in (validate, convert, export, stats):
        data_app.command(verb.__name__)(verb)
    data_app.command("inspect")(inspect)


def validate(
    files: Files,
    kind: AnyKind = Kind.auto,
    tokenizer: TokenizerPath = None,
    chat_template: ChatTemplateName = None,
    max_length: MaxLength = None,
    quarantine: QuarantineFile = None,
    dedup: Dedup = False,
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0, help="Name at most so many bad rows; all are counted. [default: all; 10,000 in JSON]"
        ),
    ] = None,
    messages_field: MessagesField = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    content_field: ContentField = None,
    teacher_field: TeacherField = None,
    max_mib: MaxMib = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Check every row; name each bad one by file, line, field and reason. Exit code 3 when there is one.

    With a tokenizer, each row is rendered and encoded too: what the chat template refuses or drops is bad.

    Example: trainway data validate train.jsonl --quarantine bad.jsonl
    """
    from trainway.data.quarantine import bad_rows_error
    from trainway.data.validate import validate as check

    require_tokenizer(tokenizer, chat_template=chat_template, max_length=max_length)
    bad: list[BadRecord] = []
    limit = LISTED_IN_JSON if as_json and max_errors is None else max_errors
    told = 0

    def tell(record: BadRecord) -> None:
        nonlocal told
        if limit is not None and told >= limit:
            return
        told += 1
        bad.append(record) if as_json else emit(_plain(str(record)))

    with progress_bar() as show:
        found = check(
            files,
            config=row_config(max_mib, chat_template=chat_template),
            tokenizer=tokenizer,
            max_length=max_length,
            kind=kind.value,
            names=field_names(
                messages_field, prompt_field, completion_field, text_field, content_field, teacher_field
            ),
            quarantine=quarantine,
            dedup=dedup,
            force=force,
            on_bad=tell,
            progress=show,
        )
    if as_json:
        errors = [{**dataclasses.asdict(record), "source": str(record.source)} for record in bad]
        emit_json({**found.as_dict(), "errors": errors})
        if found.bad:
            raise typer.Exit(ExitCode.DATA)
        return
    if found.bad > told:
        emit(f"and {found.bad - told:,} more")
    if found.bad:
        raise bad_rows_error(found.bad, found.rows, quarantine)
    emit(f"ok: {_summary(found)}")


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, a directory or a pattern of rows.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The format is its suffix: .jsonl .jsonl.gz .csv .csv.gz .parquet."
        ),
    ],
    from_shape: Annotated[Kind, typer.Option(help="Shape of the rows; auto: each row's own.")] = Kind.auto,
    to_shape: Annotated[Shape | None, typer.Option(help="Shape to write. [default: each row's own]")] = None,
    quarantine: QuarantineFile = None,
    dedup: Dedup = False,
    messages_field: MessagesField = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    content_field: ContentField = None,
    teacher_field: TeacherField = None,
    max_mib: MaxMib = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert between JSON lines, CSV and Parquet, and between shapes. A bad row ends it, unless quarantined.

    Example: trainway data convert data.csv train.jsonl
    """
    from trainway.data.convert import convert as run

    with progress_bar() as show:
        done = run(
            source,
            out,
            config=row_config(max_mib),
            names=field_names(
                messages_field, prompt_field, completion_field, text_field, content_field, teacher_field
            ),
            from_shape=from_shape.value,
            to_shape=to_shape.value if to_shape else None,
            quarantine=quarantine,
            dedup=dedup,
            force=force,
            progress=show,
        )
    if as_json:
        emit_json(done.as_dict())
        return
    notes = {"duplicates left out": done.duplicates, "bad rows set aside": done.bad, **done.left_out}
    emit(f"ok: {out}, {_counted(done.rows, 'row')}" + _noted(notes))


def export(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A Hub id, a directory or a file.")],
    out: Annotated[Path, typer.Option(help="File to write, .jsonl or .jsonl.gz.")],
    split: Annotated[
        str, typer.Option(help="A split or a slice of it: train, train[:1%], test[100:200].")
    ] = "train",
    subset: Annotated[str | None, typer.Option(help="The dataset's configuration.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the Hub.")] = None,
    messages_key: Annotated[
        MessagesKey, typer.Option(help="Name that conversations are written under.")
    ] = MessagesKey.messages,
    lang: Annotated[str | None, typer.Option(help="Keep rows of this language only.")] = None,
    paths: Annotated[
        TreePaths, typer.Option(help="Of a tree of messages: the best-ranked conversation, or all.")
    ] = TreePaths.best,
    kind: AnyKind = Kind.auto,
    quarantine: QuarantineFile = None,
    messages_field: MessagesField = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    content_field: ContentField = None,
    teacher_field: TeacherField = None,
    max_mib: MaxMib = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a split of a dataset as JSON lines; trees of messages (oasst1) become conversations.

    Example: trainway data export OpenAssistant/oasst1 --split 'train[:1%]' --lang en --out oasst.jsonl
    """
    from trainway.data.export import export as run

    done = run(
        dataset,
        out,
        split=split,
        subset=subset,
        revision=revision,
        messages_key=messages_key.value,
        lang=lang,
        paths=paths.value,
        kind=kind.value,
        names=field_names(
            messages_field, prompt_field, completion_field, text_field, content_field, teacher_field
        ),
        quarantine=quarantine,
        force=force,
        config=row_config(max_mib),
        progress=_row_counter(),
    )
    if as_json:
        emit_json(done.as_dict())
        return
    what = "conversation" if done.layout == "tree" else "row"
    notes = {"bad rows set aside": done.bad, **done.left_out}
    emit(f"ok: {out}, {_counted(done.rows, what)} from {_counted(done.read, 'row')}" + _noted(notes))


def stats(
    files: Files,
    kind: AnyKind = Kind.auto,
    tokenizer: TokenizerPath = None,
    chat_template: ChatTemplateName = None,
    max_length: MaxLength = None,
    dedup: Dedup = False,
    messages_field: MessagesField = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    content_field: ContentField = None,
    teacher_field: TeacherField = None,
    max_mib: MaxMib = None,
    as_json: AsJson = False,
) -> None:
    """Rows by shape, lengths in characters or tokens (of rendered rows, with a chat template), duplicates.

    Example: trainway data stats train.jsonl --tokenizer my-tokenizer --max-length 2048
    """
    from trainway.data.stats import measure

    require_tokenizer(tokenizer, chat_template=chat_template, max_length=max_length)
    with progress_bar() as show:
        found = measure(
            files,
            config=row_config(max_mib, chat_template=chat_template),
            names=field_names(
                messages_field, prompt_field, completion_field, text_field, content_field, teacher_field
            ),
            kind=kind.value,
            tokenizer=tokenizer,
            max_length=max_length,
            dedup=dedup,
            progress=show,
        )
    if as_json:
        emit_json(found.as_dict())
    else:
        _show_stats(found)


def inspect(
    file: OneFile,
    row: Annotated[
        int | None,
        typer.Option("--row", "--line", min=1, help="Line at which it begins; of Parquet, the row's number."),
    ] = None,
    first: Annotated[int, typer.Option(min=1, help="Show so many rows from the beginning.")] = 1,
    kind: AnyKind = Kind.auto,
    tokenizer: TokenizerPath = None,
    chat_template: ChatTemplateName = None,
    train_on: TrainOnChoice = None,
    max_length: MaxLength = None,
    messages_field: MessagesField = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    content_field: ContentField = None,
    teacher_field: TeacherField = None,
    max_mib: MaxMib = None,
    as_json: AsJson = False,
) -> None:
    """Show rows field by field, control characters as escapes; with a tokenizer, token by token.

    With a chat template, of the rendered row; trained tokens are green, or in ⟦brackets⟧ where there is no colour.

    Example: trainway data inspect train.jsonl --line 17 --tokenizer my-tokenizer --chat-template chatml
    """
    from trainway.data.show import inspect_rows, render

    require_tokenizer(tokenizer, chat_template=chat_template, train_on=train_on, max_length=max_length)

    shown = inspect_rows(
        file,
        line=row,
        first=first,
        config=row_config(max_mib, chat_template=chat_template, train_on=train_on),
        names=field_names(
            messages_field, prompt_field, completion_field, text_field, content_field, teacher_field
        ),
        kind=kind.value,
        tokenizer=tokenizer,
        max_tokens=max_length,
        warn=lambda warning: print(f"warning: {_plain(warning)}", file=sys.stderr),
    )
    if as_json:
        emit_json([dataclasses.asdict(item) for item in shown])
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        emit("\n\n".join("\n".join(render(item, colour=colour)) for item in shown))
    if any(item.error for item in shown):
        raise typer.Exit(ExitCode.DATA)


def _plain(text: str) -> str:
    from trainway.data.printable import printable

    return printable(text).replace("\n", "\\n")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _noted(notes: dict[str, int]) -> str:
    return "".join(f"; {_plain(what)}: {count:,}" for what, count in notes.items() if count)


def _summary(found: Validation) -> str:
    shapes = ", ".join(f"{name}: {count:,}" for name, count in found.shapes.most_common())
    parts = [f"{_counted(found.rows, 'row')} in {_counted(found.files, 'file')} ({shapes})"]
    if found.turns:
        parts.append(_counted(found.turns, "turn"))
    parts.append(_counted(found.characters, "character"))
    if found.duplicates is not None:
        parts.append(_counted(found.duplicates, "duplicate"))
    return ", ".join(parts)


def _show_stats(found: Stats) -> None:
    unit = found.unit
    facts = [
        ("files", f"{found.files:,} ({found.bytes:,} bytes)"),
        ("rows", f"{found.rows:,}"),
        ("bad rows", f"{found.bad:,}" + ("  (trainway data validate names them)" if found.bad else "")),
        ("duplicates", f"{found.duplicates:,}"),
        ("mean length", f"{found.mean:,.1f} {unit}"),
        *((f"  at {float(share):.0%}", f"{length:,}") for share, length in found.quantiles.items()),
    ]
    if found.max_length is not None:
        facts.append((f"over {found.max_length:,}", f"{found.too_long:,} rows"))
    facts += [(f"refused: {_plain(why)}", f"{count:,}") for why, count in found.refused.most_common(10)]
    emit_table(facts)
    shapes = [
        [name, *(f"{value:,}" for value in (shape.rows, shape.turns, shape.characters, shape.tokens))]
        for name, shape in sorted(found.shapes.items())
    ]
    wide = 5 if unit == "tokens" else 4
    emit("")
    emit_table([row[:wide] for row in shapes], ["shape", "rows", "turns", "characters", "tokens"][:wide])
    highest = max(count for _, _, count in found.histogram)
    bars = [
        (f"{low:,} to {high:,}", f"{count:,}", "█" * max(1, count * BAR // highest) if count else "")
        for low, high, count in found.histogram
    ]
    emit("")
    emit_table(bars, [unit, "rows", ""])
    emit("")
    longest = [(f"{_plain(source)}:{line}", f"{length:,}") for source, line, length in found.longest]
    emit_table(longest, ["longest rows", unit])


def _row_counter() -> Callable[[str, int, int], None]:
    """Progress where nobody knows how many rows there are; silent when nobody watches."""
    if not sys.stderr.isatty():
        return lambda what, done, total: None
    return lambda what, done, total: print(f"\r{what}: {done:,}\r", end="", file=sys.stderr, flush=True)
