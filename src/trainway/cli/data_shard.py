"""`trainway data shard`: documents to text shards, gone on with after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainway.cli.terminal import emit, emit_json, progress_bar


def register(data_app: typer.Typer) -> None:
    data_app.command("shard")(shard)


def shard(
    out: Annotated[Path, typer.Option(help="Directory of the shards; of the training ones in mode split.")],
    mode: Annotated[
        str | None,
        typer.Option(help="smoke: a sample; prod: everything; split: training and validation. [prod]"),
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="File, directory or pattern; may be repeated.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hugging Face dataset: a Hub id, a directory, or a file or URL.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of the dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the dataset, as in train[:1%]. [train]")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field or column of the text. [text]")] = None,
    text_unit: Annotated[
        str | None, typer.Option(help="A document of a text file: file, paragraph or line. [file]")
    ] = None,
    lines_per_shard: Annotated[int | None, typer.Option(help="Documents in a shard. [50000]")] = None,
    take: Annotated[int | None, typer.Option(help="Documents of the sample in mode smoke. [100000]")] = None,
    val_ratio: Annotated[
        float | None, typer.Option(help="Share held out for validation in mode split. [0.01]")
    ] = None,
    val_out: Annotated[
        Path | None, typer.Option(help="Directory of the validation shards. [beside --out: val, or OUT-val]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides what mode split holds out. [42]")] = None,
    format: Annotated[
        str | None, typer.Option(help="text: line breaks become spaces; jsonl: nothing is lost. [text]")
    ] = None,
    gzip: Annotated[bool | None, typer.Option("--gzip", help="Compress the shards (.gz).")] = None,
    on_bad_record: Annotated[
        str | None, typer.Option(help="A malformed record: error or quarantine. [error]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write documents to shards of one line each, with a manifest. Run it again to go on after an interruption.

    Example: trainway data shard --mode split --input corpus.jsonl --gzip --out datasets/train
    """
    import dataclasses

    from trainway.data.shard import shard as write_shards
    from trainway.data.shard import shard_settings
    from trainway.logs import start_logging
    from trainway.training.shutdown import StopSignal

    values = {
        "out": str(out), "mode": mode, "inputs": inputs or None, "dataset": dataset, "subset": subset,
        "revision": revision, "split": split, "text_field": text_field, "text_unit": text_unit,
        "lines_per_shard": lines_per_shard, "take": take, "val_ratio": val_ratio,
        "val_out": str(val_out) if val_out else None, "seed": seed, "format": format, "gzip": gzip,
        "on_bad_record": on_bad_record,
    }  # fmt: skip
    settings = shard_settings({name: value for name, value in values.items() if value is not None})
    start_logging("info", is_main=True)
    with StopSignal() as signals, progress_bar() as progress:
        report = write_shards(settings, stop=lambda: signals.requested, progress=progress)
    if as_json:
        emit_json(dataclasses.asdict(report))
        return
    parts = [(report.out, report.train)]
    if report.val_out is not None and report.validation is not None:
        parts.append((report.val_out, report.validation))
    for folder, totals in parts:
        state = "verified" if report.cached else "ok"
        emit(
            f"{state}: {folder}: {totals['lines']:,} documents in {totals['shards']:,} shards, "
            f"{totals['bytes'] / 1e6:,.1f} MB"
        )
    if report.quarantined:
        emit(f"{report.quarantined:,} malformed records set aside: {report.out / 'quarantine.jsonl'}")
