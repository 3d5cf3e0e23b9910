"""`trainway data`, `trainway prepare` and `trainway tokenizer`: data made ready before any GPU is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainway.cli import data_records, data_shard
from trainway.cli.arguments import CONFIG_HELP, CONFIG_METAVAR, OPEN_ENDED, split_arguments
from trainway.cli.terminal import emit, emit_json, progress_bar

if TYPE_CHECKING:
    from trainway.config.schema import DataConfig
    from trainway.data.sources import Source

data_app = typer.Typer(
    help="Shard, check, convert and look at data.", no_args_is_help=True, rich_markup_mode=None
)
tokenizer_app = typer.Typer(help="Train and look at tokenizers.", no_args_is_help=True, rich_markup_mode=None)

Words = Annotated[
    list[str] | None, typer.Argument(metavar=CONFIG_METAVAR, help=CONFIG_HELP, show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    app.command("prepare", context_settings=OPEN_ENDED)(prepare)
    data_shard.register(data_app)
    data_records.register(data_app)
    app.add_typer(data_app, name="data")
    app.add_typer(tokenizer_app, name="tokenizer")


def prepare(
    words: Words = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Spread the work: into how many parts the files are divided.")
    ] = None,
    worker_index: Annotated[
        str | None, typer.Option(help="Which part to make, from 0; auto: what JOB_COMPLETION_INDEX says.")
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Join the parts of all workers to the store; with --worker-index only if it is the last.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Validate, split and tokenise the documents or conversations into a token store; what is done already is reused.

    Example: trainway prepare m3_medium data.train=corpus.jsonl
    """
    from trainway.config.load import load_config
    from trainway.data.prepare import prepare_as_asked

    source, overrides = split_arguments(words or [])
    config = load_config(source, overrides).config
    with progress_bar() as progress:
        done = prepare_as_asked(
            config, num_workers=num_workers, worker_index=worker_index, merge=merge, progress=progress
        )
    if as_json:
        emit_json(done.to_json())
    else:
        absent = [f"absent, left out: {name}" for name in done.absent]
        emit("\n".join([*absent, *done.warnings, done.summary, f"ok: {done.store_dir}"]))


@tokenizer_app.command("train", context_settings=OPEN_ENDED)
def train(
    out: Annotated[Path, typer.Option(help="Directory to write the tokenizer to.")], words: Words = None
) -> None:
    """Train a byte-level BPE on the training documents.

    Example: trainway tokenizer train m3_medium data.train=corpus.jsonl --out my-tokenizer
    """
    from trainway.config.load import load_config
    from trainway.data.inputs import training_sources
    from trainway.data.tokenizer import train_tokenizer, vocab_size

    source, overrides = split_arguments(words or [])
    config = load_config(source, overrides).config
    sources = training_sources(config.data)
    with progress_bar() as show:
        tokenizer = train_tokenizer(
            _texts(sources, config.data),
            config.tokenizer,
            out,
            progress=lambda done, total, what: show(what, done, total),
            total=sum(item.size for item in sources),
        )
    emit(f"ok: {out}, {vocab_size(tokenizer):,} tokens")


@tokenizer_app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A bundle's directory or a tokenizer.json.")],
    text: Annotated[str | None, typer.Argument(help="Show how this text is split.")] = None,
    as_json: AsJson = False,
) -> None:
    """Size and special tokens of a tokenizer, and how it splits a text.

    Example: trainway tokenizer show my-tokenizer "def main():"
    """
    from trainway.data.tokenizer import load_tokenizer, vocab_size

    tokenizer = load_tokenizer(path)
    shown = {"vocab_size": vocab_size(tokenizer), "special_tokens": tokenizer.special_tokens_map}
    if text is not None:
        shown["tokens"] = tokenizer.tokenize(text)
        shown["ids"] = tokenizer.encode(text, add_special_tokens=False)
    if as_json:
        emit_json(shown)
    else:
        emit("\n".join(f"{key}: {value}" for key, value in shown.items()))


def _texts(sources: Iterable[Source], config: DataConfig) -> Iterator[str]:
    from trainway.data.sources import BadRecord, read_documents
    from trainway.errors import DataError

    for source in sources:
        for document in read_documents(source.path, config, text_unit=source.text_unit):
            if not isinstance(document, BadRecord):
                yield document.text
            elif config.on_bad_record == "error":
                raise DataError(
                    str(document), "a record is malformed", "correct it, or set data.on_bad_record=quarantine"
                )
