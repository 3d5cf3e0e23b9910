"""A finished preparation: the verified store, how its sources are mixed, how many rows they make, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainway.config.schema import RunConfig
from trainway.data.building import Job, check_vocab_size
from trainway.data.conversation_rows import count_rows
from trainway.data.inputs import present_sources
from trainway.data.mix import Mix, mix_rows, plan_mix
from trainway.data.packing import efficiency
from trainway.data.store import StoreManifest, TokenStore
from trainway.data.turns import Turn


@dataclass(frozen=True)
class PreparedData:
    """A verified token store. The name of `store_dir` is the hash of all that it was made from."""

    store_dir: Path
    tokenizer_dir: Path
    manifest: StoreManifest
    summary: str
    cached: bool
    absent: tuple[str, ...] = ()
    """Names of the optional sources that are not there."""
    mix: Mix | None = None
    """How the sources are mixed, in rows of train.seq_len; None when they are one stream."""
    rows: int | None = None
    """Rows of conversations in one pass over them, packed or not; None for documents, whose rows are cut to measure."""
    warnings: tuple[str, ...] = ()
    """What the user should know of the tokenizer and its chat template."""

    def rows_per_epoch(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens in one pass over the data."""
        tokens: int = self.manifest.splits["train"]["tokens"]
        if self.mix is not None:
            return self.mix.rows_per_epoch
        return tokens // seq_len if self.rows is None else self.rows

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; the mix as {name, share} of each source."""
        mix = self.mix and [
            {"name": name, "share": float(share)}
            for name, share in zip(self.mix.names, self.mix.shares, strict=True)
        ]
        return {
            **asdict(self),
            "store_dir": str(self.store_dir),
            "tokenizer_dir": str(self.tokenizer_dir),
            "mix": mix,
        }


def open_prepared(job: Job, own: Turn, cached: bool) -> PreparedData:
    """Verify the finished store: every byte, unless another process did while this one waited for its turn.

    Raises DataError for an altered file, and for a source of a mix that is shorter than one row.
    """
    store = TokenStore.open(job.store_dir, verify=not own.finished_since(job.began))
    own.finish()
    check_vocab_size(job.config, store.manifest.vocab_size)
    rows = _conversation_rows(job, store)
    mix = _mix(job, store, rows)
    if rows is None:
        summary = _summary(store.manifest)
    elif job.config.recipe == "gad":
        summary = _teacher_summary(store.manifest)
    else:
        summary = _conversation_summary(job.config, store.manifest, rows)
    return PreparedData(
        job.store_dir,
        store.tokenizer_dir,
        store.manifest,
        summary,
        cached,
        job.absent,
        mix,
        None if rows is None else sum(rows),
        tuple(job.encoder.warnings) if job.encoder else (),
    )


def _conversation_rows(job: Job, store: TokenStore) -> list[int] | None:
    """Rows of conversations in one pass over each stream; None for documents."""
    if job.encoder is None:
        return None
    config = job.config
    packing = "none" if config.recipe == "gad" else config.data.packing
    return [count_rows(stream, config.train.seq_len, packing) for stream in store.streams()]


def _mix(job: Job, store: TokenStore, rows: Sequence[int] | None) -> Mix | None:
    if not store.manifest.streams:
        return None
    present = present_sources(job.config.data, job.inputs)
    if rows is not None:
        return mix_rows(present, rows)
    tokens = [stream["tokens"] for stream in store.manifest.streams]
    return plan_mix(present, tokens, job.config.train.seq_len)


def _summary(manifest: StoreManifest) -> str:
    train, val = manifest.splits["train"], manifest.splits["val"]
    text = (
        f"{train['documents']:,} documents, {train['tokens']:,} tokens for training; "
        f"{val['documents']:,} documents, {val['tokens']:,} tokens for validation; "
        f"{train['text_bytes'] / max(1, train['tokens'] - 2 * train['documents']):.2f} bytes per token"
    )
    if manifest.duplicates:
        text += f"; {manifest.duplicates:,} duplicates left out"
    return text + (f"; {manifest.quarantined:,} malformed records set aside" if manifest.quarantined else "")


def _conversation_summary(config: RunConfig, manifest: StoreManifest, rows: Sequence[int]) -> str:
    """Of the rows: how many, their tokens and targets, what was left out, and how full they are."""
    train, val = manifest.splits["train"], manifest.splits["val"]
    seq_len = config.train.seq_len
    text = "; ".join(
        f"{split['documents']:,} conversations, {split['tokens']:,} tokens, {split['trained']:,} of them trained, "
        f"for {use}"
        for split, use in ((train, "training"), (val, "validation"))
    )
    if config.data.packing == "documents":
        full = efficiency(train["tokens"], sum(rows), seq_len)
        text += f"; packed into {sum(rows):,} rows of {seq_len}, {full:.1%} full"
    return text + _lost(manifest)


def _teacher_summary(manifest: StoreManifest) -> str:
    """Of the rows: how many prompts and answers, their tokens, and what was left out."""
    text = "; ".join(
        f"{split['documents']:,} prompts of {split['tokens'] - split['trained']:,} tokens, "
        f"their answers of {split['trained']:,}, for {use}"
        for split, use in ((manifest.splits["train"], "training"), (manifest.splits["val"], "validation"))
    )
    return text + _lost(manifest)


def _lost(manifest: StoreManifest) -> str:
    """What of the rows is not in the store."""
    lost, text = manifest.conversations or {}, ""
    if lost.get("too_long"):
        text += f"; {lost['too_long']:,} too long, left out"
    if lost.get("truncated"):
        text += f"; {lost['truncated']:,} truncated ({lost['turns_left_out']:,} turns left out, {lost['cut']:,} cut)"
    if manifest.duplicates:
        text += f"; {manifest.duplicates:,} duplicates left out"
    return text + (f"; {manifest.quarantined:,} malformed rows set aside" if manifest.quarantined else "")
