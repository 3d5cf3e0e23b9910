"""`trainway orchestrate`: the boot of an experiment, from a volume to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.arguments import OPEN_ENDED, parse_count
from trainway.cli.terminal import emit_json, progress_bar

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings over the preset: total_steps=1000.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    app.command("orchestrate", context_settings=OPEN_ENDED)(orchestrate)


def orchestrate(
    words: Words = None,
    mode: Annotated[
        str, typer.Option(help="cloud: volume at /workspace, Hub's files on it; local: here.")
    ] = "local",
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="File, directory or pattern of text; may be repeated.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Text to validate on; else a share of the input is held out.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A Hugging Face dataset instead of --input.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of the dataset.")] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Names the directories; else RUN_EXPERIMENT.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="The volume; else TRAINWAY_ROOT.")] = None,
    config: Annotated[str | None, typer.Option(help="Preset or file; else RUN_CONFIG.")] = None,
    train_shard_lines: Annotated[
        int | None, typer.Option(help="Documents in a shard; else SHARD_LINES, else 250000.")
    ] = None,
    reuse_shards: Annotated[
        bool, typer.Option("--reuse-shards", help="Use the shards on the volume; shard nothing.")
    ] = False,
    tokenizer_json: Annotated[
        str | None, typer.Option(help="A published tokenizer.json or bundle; else one is reused or trained.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of the shards: jsonl loses nothing; text is one line a document.")
    ] = "jsonl",
    gzip: Annotated[bool, typer.Option("--gzip", help="Compress the shards.")] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Stop when everything is prepared.")] = False,
    nproc: Annotated[
        str | None, typer.Option(help="Processes on this machine, or auto: one per GPU.")
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option(help="Variables below the real environment; else .env where there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Directories, shards, tokenizer, configurations, token store, training; what is complete is skipped.

    Example: trainway orchestrate --mode cloud --input corpus.jsonl --experiment runpod-1b
    """
    import dataclasses

    from trainway.config.knobs import read_knobs
    from trainway.launch.dotenv import source_dotenv
    from trainway.recipes.orchestrate import Orchestration
    from trainway.recipes.orchestrate import orchestrate as boot

    notes = source_dotenv(env_file)
    knobs = read_knobs(mode, experiment=experiment, config=config, root=root, shard_lines=train_shard_lines)
    settings = list(words or [])
    if nproc is not None:
        settings.append(f"engine.nproc={parse_count(nproc)}")
    request = Orchestration(
        knobs,
        overrides=tuple(settings),
        inputs=tuple(input_ or ()),
        validation=tuple(validation or ()),
        dataset=dataset,
        subset=subset,
        reuse_shards=reuse_shards,
        tokenizer_json=tokenizer_json,
        format=format_,
        gzip=gzip,
        train=not no_train,
        notes=notes,
    )
    with progress_bar() as progress:
        result = boot(request, progress)
    if as_json:
        emit_json(dataclasses.asdict(result))
    return result.exit_code
