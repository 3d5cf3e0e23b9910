"""Which files a release may hold: what is not listed here is left out, and named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CARD = "README.md"
SUMS = "SHA256SUMS"
RECORDS = "training"
"""Folder of what tells of the training, apart from what libraries load."""

MODEL_FILES = re.compile(
    r"(model|adapter_model)(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?"
    r"|(config|generation_config|adapter_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.jinja|additional_chat_templates/[A-Za-z0-9_-]+\.jinja"
)
OWN_FILES = re.compile(
    rf"{re.escape(CARD)}|{SUMS}|loss\.png"
    rf"|{RECORDS}/(config\.yaml|metrics\.jsonl|report\.json|report\.html|provenance\.json)"
)


@dataclass(frozen=True)
class Left:
    """A file that stays here."""

    path: str
    reason: str


def is_allowed(path: str) -> bool:
    """Whether a file of this name, seen from the release's directory, may leave."""
    return MODEL_FILES.fullmatch(path) is not None or OWN_FILES.fullmatch(path) is not None


def allowed_files(directory: Path) -> tuple[list[str], list[Left]]:
    """(names of the files that may leave, in order; what stays, each with a reason); links are never followed."""
    kept, left = [], []
    for name, place in _walk(directory):
        if place.is_symlink():
            left.append(Left(name, "a link"))
        elif not place.is_file():
            left.append(Left(name, "no plain file"))
        elif not is_allowed(name):
            left.append(Left(name, "Python code" if name.endswith(".py") else "not one of a model's files"))
        else:
            kept.append(name)
    return sorted(kept), sorted(left, key=lambda one: one.path)


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*names, *links]:
            place = Path(folder) / name
            yield place.relative_to(directory).as_posix(), place
