"""What a model is evaluated on: the validation split of its run, or files, in its own tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainway.config.schema import RunConfig, TokenizerConfig
from trainway.data.building import finish_store, open_writer, settle, write_documents, write_tokenizer
from trainway.data.conversations import longest_row
from trainway.data.inputs import InputFile
from trainway.data.prepare import prepare
from trainway.data.store import TOKENIZER_DIR, TokenStore
from trainway.data.turns import Progress
from trainway.errors import ConfigError, DataError

Counted = Literal["auto", "text", "answers"]
"""Which tokens count: every one of a text, or the answers of conversations; auto: as the run was trained."""


@dataclass(frozen=True)
class SourceStore:
    """One source, tokenised: its documents are the validation split of `store`."""

    name: str
    store: TokenStore


def settings_for(config: RunConfig | None, counted: Counted, seq_len: int | None, longest: int) -> RunConfig:
    """The run's settings as files are read by them, those of a model without a run from scratch.

    longest: tokens that the model accepts in a row.
    """
    base = config or RunConfig(recipe="pretrain")
    recipe = base.recipe
    if counted == "text":
        recipe = "pretrain"
    elif counted == "answers" and recipe == "pretrain":
        recipe = "sft"
    default = longest_row(config) if config else min(512, longest)
    data = base.data
    if recipe == "pretrain" and data.packing == "none":
        data = data.model_copy(update={"packing": "documents"})
    if recipe != "pretrain" and data.packing == "concat":
        data = data.model_copy(update={"packing": "documents"})
    train = base.train.model_copy(update={"seq_len": seq_len or default})
    return base.model_copy(update={"recipe": recipe, "data": data, "train": train})


def agreed_counting(configs: Sequence[RunConfig | None], counted: Counted, has_data: bool) -> Counted:
    """What counts on files for every model alike: without that their figures are not of the same thing.

    Raises ConfigError where runs of texts and of conversations are compared, and nobody said what counts.
    """
    if counted != "auto" or not has_data:
        return counted
    recipes = {config.recipe for config in configs if config is not None}
    if recipes <= {"pretrain"}:
        return "text"
    if "pretrain" in recipes:
        raise ConfigError(
            "some of these models were trained on texts and some on conversations",
            "a text is measured by all of its tokens, a conversation by its answers",
            "say what counts: --count text or --count answers",
        )
    return "auto" if None not in configs else "answers"


def validation_store(config: RunConfig, directory: Path, progress: Progress) -> TokenStore:
    """The token store of a run's own data, prepared anew where it is gone; `directory`: of its model."""
    prepared = prepare(config, tokenizer_dir=directory if config.model.path else None, progress=progress)
    return TokenStore.open(prepared.store_dir, verify=False)  # prepare verifies


def validation_parts(
    config: RunConfig, store: TokenStore, scratch: Path, progress: Progress
) -> list[tuple[str, int]]:
    """Name and documents of each file of the run's validation split, in its order; empty where they are not known.

    Of held-out training documents nothing says which source they are from.
    """
    names = config.data.validation
    if len(names) < 2:
        return []
    stores = [
        source_store(config, name, store.tokenizer_dir, scratch / f"part-{place}", progress)
        for place, name in enumerate(names)
    ]
    counts = [one.store.split("val").num_documents for one in stores]
    if sum(counts) != store.split("val").num_documents:
        return []  # a file named twice, say, which is there once
    return list(zip(names, counts, strict=True))


def source_store(
    settings: RunConfig, source: str, tokenizer_dir: Path, out: Path, progress: Progress
) -> SourceStore:
    """Tokenise all documents of `source`, a file, directory or pattern, into the new directory `out`.

    Raises DataError for missing or malformed data.
    """
    changes = {"train": (source,), "validation": (), "val_ratio": 0.5, "dedup": False}
    config = settings.model_copy(
        update={
            "data": settings.data.model_copy(update=changes),
            "tokenizer": TokenizerConfig(path=str(tokenizer_dir)),
            "model": settings.model.model_copy(update={"vocab_size": None}),
        }
    )
    job = settle(config, Path.cwd(), progress, time.time())
    files = [
        InputFile(file.source, "validation", "val") for file in job.inputs.files
    ]  # none is to learn from
    out.mkdir(parents=True)
    tokenizer = write_tokenizer(job, out / TOKENIZER_DIR)
    with open_writer(job, out, tokenizer) as writer:
        left_out = write_documents(job, files, tokenizer, writer)
        finish_store(job, writer, tokenizer, files, left_out)
        if not writer.documents("val"):
            raise DataError(f"{source} has no document to evaluate on", "it is empty, or every row was left out",
                            "name another file: --data FILE")  # fmt: skip
    return SourceStore(source, TokenStore.open(out, verify=False))
