"""Directories that other servers read a model from: links to what is there, and what they need beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from trainway.checkpoint.weights import is_in_pieces
from trainway.models.published import is_published
from trainway.release.bundle import Merge, adapter_base, complete, publish, write_merged
from trainway.release.endings import write_ends


def view_model(source: Path, out: Path) -> None:
    """A plain model, as its family publishes it; the weights are only copied where they have other names or pieces.

    Raises DataError for damaged weights, OSError of the disk.
    """
    if is_in_pieces(source) or not is_published(source):
        publish(source, out)
    else:
        _link(source, out)
    complete(source, out)


def view_adapter(source: Path, out: Path) -> None:
    """An adapter, its tokenizer, and where its answers end. Raises as `view_model`."""
    if is_in_pieces(source):
        publish(source, out)
    else:
        _link(source, out)
    base = adapter_base(source).directory
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (out / name).exists() and (base / name).exists():
            shutil.copyfile(base / name, out / name)
    complete(source, out)
    write_ends(AutoTokenizer.from_pretrained(out, local_files_only=True), out)


def view_merged(source: Path, out: Path) -> None:
    """An adapter merged into its base. Raises as `view_model`."""
    out.mkdir(parents=True)
    write_merged(source, out, Merge(adapter_base(source)))
    complete(source, out)


def _link(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path.resolve(), out / path.name)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
