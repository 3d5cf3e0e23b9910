"""What every way of preparing shares: what a store is made from, its key, its tokenizer, its last checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerFast

from trainway.config.mixes import source_name, train_sources
from trainway.config.schema import RunConfig
from trainway.data.chat import ChatEncoder
from trainway.data.conversations import longest_row, refuse_too_long, write_conversations
from trainway.data.dedup import Deduplicator
from trainway.data.documents import (
    HeldOut,
    bad_records_error,
    json_lines,
    refuse_bad_records,
    sample_texts,
    split_texts,
)
from trainway.data.hub_sources import with_local_sources
from trainway.data.inputs import InputFile, Inputs, find_inputs, present_sources
from trainway.data.remote_sources import with_fetched_sources
from trainway.data.rows import BadRecord
from trainway.data.store import (
    FORMAT_VERSION,
    LEFT_OUT,
    QUARANTINE,
    StoreManifest,
    StoreWriter,
)
from trainway.data.teacher import TeacherEncoder
from trainway.data.tokenise import has_bos, tokenise
from trainway.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_hash,
    train_tokenizer,
    vocab_size,
)
from trainway.data.turns import Progress
from trainway.errors import ConfigError, DataError

BAD_RECORDS = "bad-records"
OF_CONVERSATIONS = ("sft", "gad")
"""The recipes that read conversations, in the tokens of a model that is there; the others read documents."""


@dataclass(frozen=True)
class Job:
    """What one call prepares, settled before anything is written."""

    config: RunConfig
    cache: Path
    inputs: Inputs
    given: PreTrainedTokenizerFast | None
    """The tokenizer to reuse; None means that one is trained."""
    content: dict[str, Any]
    """Everything that the store depends on: paths and the number of cores do not count."""
    report: Progress
    began: float
    encoder: ChatEncoder | None = None
    """What makes tokens of conversations; None when the sources are read as documents."""

    @property
    def store_dir(self) -> Path:
        return self.cache / content_key(self.content)

    @property
    def streams(self) -> list[str]:
        """Names of the sources of a mix; empty without one."""
        names = [source_name(source) for source in present_sources(self.config.data, self.inputs)]
        return names if self.inputs.per_stream() else []

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the optional sources that are not there."""
        sources = enumerate(train_sources(self.config.data))
        return tuple(source_name(source) for place, source in sources if place not in self.inputs.present)


@dataclass(frozen=True)
class LeftOut:
    """How many records of the sources are not in the store."""

    quarantined: int = 0
    duplicates: int = 0
    too_long: int = 0
    truncated: int = 0
    """Rows of conversations that are in the store without some of their turns, or cut."""
    turns_left_out: int = 0
    cut: int = 0

    def facts(self, max_tokens: int | None) -> dict[str, Any]:
        """The manifest's fields; max_tokens: of a row of conversations, None for documents."""
        counts = asdict(self)
        facts: dict[str, Any] = {name: counts.pop(name) for name in ("quarantined", "duplicates")}
        if max_tokens is not None:
            facts["conversations"] = {"max_tokens": max_tokens, **counts}
        return facts


def settle(
    config: RunConfig, root: Path, report: Progress, began: float, tokenizer_dir: Path | None = None
) -> Job:
    """Check the settings, find and hash the sources, load the tokenizer (`tokenizer_dir`: the model's own).

    Raises ConfigError for settings that contradict each other, DataError for missing or altered files.
    """
    _check_settings(config)
    path = _tokenizer_path(config, root, tokenizer_dir, report)
    given = load_tokenizer(path) if path else None
    if given is not None:
        check_vocab_size(config, vocab_size(given))
    cache = root / Path(config.data.store_dir).expanduser()
    encoder = None
    config = config.model_copy(update={"data": with_fetched_sources(config.data, cache, report)})
    if config.recipe in OF_CONVERSATIONS:
        assert given is not None
        encoder = _encoder(config, given)
        config = config.model_copy(update={"data": with_local_sources(config.data, root, cache, report)})
    inputs = find_inputs(config.data, root, cache, report, began)
    content = _content(config, inputs, given)
    if encoder is not None:
        content = {**content, "recipe": config.recipe, "encoder": encoder.identity()}
    if config.recipe == "gad":
        content["fields"] = [config.data.prompt_field, config.data.response_field]
    return Job(config, cache, inputs, given, content, report, began, encoder)


def content_key(content: dict[str, Any]) -> str:
    """32 hex digits that differ whenever the store would."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def clear_stale(path: Path) -> None:
    """Remove what a killed process left of the directory `path`, whose lock is ours."""
    for stale in path.parent.glob(f"{path.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def write_tokenizer(job: Job, out: Path) -> PreTrainedTokenizerFast:
    """Save the tokenizer to reuse in the directory `out`, or train one there; as every later reader sees it.

    Raises DataError for malformed records, where they are errors.
    """
    config = job.config
    if job.given is not None:
        if job.encoder is not None and job.encoder.template is not None:
            # Who talks to the model renders as it was taught.
            job.given.chat_template = job.encoder.template.text
        save_tokenizer(job.given, out)
    else:
        bad: list[BadRecord] = []
        sources, budget = job.inputs.of("train"), config.tokenizer.sample_mib << 20
        train_tokenizer(
            sample_texts(sources, config.data, HeldOut(config), budget, bad),
            config.tokenizer,
            out,
            progress=lambda done, total, label: job.report(label, done, total),
            total=min(budget, sum(source.size for source in sources)),
        )
        if bad and config.data.on_bad_record == "error":  # the sample may not have met them all
            refuse_bad_records(
                job.inputs.files, config.data, HeldOut(config), job.cache / f"{BAD_RECORDS}.jsonl"
            )
    tokenizer = load_tokenizer(out)
    check_vocab_size(config, vocab_size(tokenizer))
    return tokenizer


def write_documents(
    job: Job,
    files: Sequence[InputFile],
    tokenizer: PreTrainedTokenizerFast,
    writer: StoreWriter,
    part: str = "",
) -> LeftOut:
    """Tokenise the documents or conversations of `files` into `writer`; returns how many were left out.

    Raises DataError for them where they are errors; files in the cache, of which `part` ends the names, then list all.
    """
    if job.encoder is not None:
        return _write_conversations(job, job.encoder, files, writer, part)
    bad: list[BadRecord] = []
    total = sum(file.source.size for file in files)
    seen = Deduplicator() if job.config.data.dedup else None

    def report(done: int) -> None:
        job.report("tokenising", done, total)

    texts = split_texts(files, job.config.data, HeldOut(job.config), bad, report, seen)
    tokenise(texts, tokenizer, writer)
    _set_aside(job, bad, writer, part)
    return LeftOut(len(bad), seen.duplicates if seen else 0)


def open_writer(job: Job, out: Path, tokenizer: PreTrainedTokenizerFast) -> StoreWriter:
    """What writes the job's store, or a part of it, in the directory `out`."""
    masked = job.encoder is not None
    return StoreWriter(out, vocab_size(tokenizer), streams=job.streams, masked=masked)


def finish_store(
    job: Job,
    writer: StoreWriter,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[InputFile],
    left_out: LeftOut,
) -> StoreManifest:
    """Write the manifest of a store of `files`."""
    sources: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for file in files:
        entry = {"path": str(file.source.path), "size": file.source.size, "hash": file.source.hash}
        sources[file.setting].append(entry)
    return writer.finish(
        token_bytes(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        bos_id=tokenizer.bos_token_id if has_bos(tokenizer) else None,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        sources=sources,
        **left_out.facts(longest_row(job.config) if job.encoder else None),
    )


def check_documents(job: Job, writer: StoreWriter) -> None:
    """Raise DataError when a split or a source of a mix has no document."""
    train = [name for name in writer.splits() if name != "val"]
    count = sum(writer.documents(name) for name in train)
    if not count:
        raise DataError(
            "there is no training document", fix="add sources to data.train, or lower data.val_ratio"
        )
    for name, key in zip(job.streams, train, strict=False):
        if not writer.documents(key):
            raise DataError(
                f"data.train: the source {name} has no training document",
                "a source of a mix gives its share of the rows",
                "add documents to it, or leave it out",
            )
    if not writer.documents("val"):
        raise DataError(
            "there is no validation document",
            f"data.val_ratio {job.config.data.val_ratio:g} held out none of {count} documents",
            "raise data.val_ratio, or name validation sources (data.validation)"
            if job.encoder
            else "raise data.val_ratio, name validation sources (data.validation), or, for text files, cut them into "
            "more documents: data.text_unit=paragraph",
        )


def check_vocab_size(config: RunConfig, tokenizer_size: int) -> None:
    """Raise ConfigError when the model's embedding has fewer rows than the tokenizer has ids."""
    rows = config.model.vocab_size
    if rows is not None and rows < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size {rows} is smaller than the tokenizer's vocabulary of {tokenizer_size}",
            "the embedding needs a row for each token",
            f"leave model.vocab_size empty, or set tokenizer.vocab_size to {rows} at most",
        )


def _write_conversations(
    job: Job, encoder: ChatEncoder, files: Sequence[InputFile], writer: StoreWriter, part: str
) -> LeftOut:
    total = sum(file.source.size for file in files)
    tally = write_conversations(
        files, job.config, encoder, writer, lambda done: job.report("tokenising", done, total)
    )
    _set_aside(job, tally.bad, writer, part)
    if job.config.data.over_length == "error":
        listing = job.cache / f"{Path(LEFT_OUT).stem}{part}.jsonl"
        refuse_too_long(tally, writer.path / LEFT_OUT, listing, job.config)
    return LeftOut(
        len(tally.bad), tally.duplicates, tally.too_long, tally.truncated, tally.turns_left_out, tally.cut
    )


def _set_aside(job: Job, bad: list[BadRecord], writer: StoreWriter, part: str) -> None:
    """Write the quarantine beside the store, or raise the error of malformed records."""
    if bad and job.config.data.on_bad_record == "error":
        raise bad_records_error(bad, job.cache / f"{BAD_RECORDS}{part}.jsonl")
    if bad:
        (writer.path / QUARANTINE).write_text(json_lines(bad), encoding="utf-8")


def _encoder(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    if config.recipe == "gad":
        return TeacherEncoder(tokenizer, config.data)
    return ChatEncoder(tokenizer, config.data, longest_row(config))


def _tokenizer_path(
    config: RunConfig, root: Path, tokenizer_dir: Path | None, report: Progress
) -> Path | None:
    """The tokenizer to reuse; None where one is to be trained."""
    if config.tokenizer.path:
        return root / Path(config.tokenizer.path).expanduser()
    if config.recipe not in OF_CONVERSATIONS:
        return None
    if tokenizer_dir is not None:
        return tokenizer_dir
    model = config.model
    if not model.path:
        raise ConfigError(
            "there is no tokenizer for the conversations",
            "tokenizer.path and model.path are empty",
            "set model.path to the model to start from, or tokenizer.path",
        )
    directory = root / Path(model.path).expanduser()
    if directory.is_dir():
        return directory
    from trainway.models.base import find_base  # brings torch: only for a model that is not here yet

    return find_base(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        cache=root / Path(config.data.store_dir).expanduser(),
        report=report,
    ).directory


def _check_settings(config: RunConfig) -> None:
    data = config.data
    if not data.train:
        raise ConfigError(
            "data.train names no source", fix="name files, directories or patterns: data.train=[...]"
        )
    if not data.validation and data.val_ratio in (0, 1):
        left = "validation" if data.val_ratio == 0 else "training"
        raise ConfigError(
            f"data.val_ratio {data.val_ratio:g} leaves no {left} document",
            fix="set data.val_ratio to about 0.01, or name validation sources: data.validation=[...]",
        )
    if not config.tokenizer.path and config.recipe not in OF_CONVERSATIONS:
        check_vocab_size(config, config.tokenizer.vocab_size)


def _content(config: RunConfig, inputs: Inputs, tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    data = config.data
    learnt = config.tokenizer.model_dump(mode="json", exclude={"path"})
    content = {
        "format": FORMAT_VERSION,
        "sources": {
            setting: [[s.kind, s.text_unit, s.size, s.hash] for s in inputs.of(setting)]
            for setting in ("train", "validation")
        },
        "tokenizer": learnt if tokenizer is None else [tokenizer_hash(tokenizer), tokenizer.chat_template],
        "text_field": data.text_field,
        "max_document_mib": data.max_document_mib,
        "on_bad_record": data.on_bad_record,
        "split": None if data.validation else [data.val_ratio, config.seed],
    }
    # Weights, epochs and names are not part of it: another mix of the same sources is found prepared.
    if inputs.per_stream():
        content["streams"] = inputs.per_stream()
    if data.dedup:
        content["dedup"] = True
    return content
