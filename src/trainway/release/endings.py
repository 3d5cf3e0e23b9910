"""Where texts begin and answers end, written where other programs look for it: tokenizer and generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from trainway.data.teacher import end_of_turn, end_tokens, own_template
from trainway.data.tokenizer import save_tokenizer
from trainway.errors import ConfigError
from trainway.files import atomic_write, read_json

GENERATION_CONFIG = "generation_config.json"


def known_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: what the chat template writes behind it, and the end of a document."""
    try:
        return end_tokens(tokenizer, own_template(tokenizer))
    except ConfigError:  # a template that writes no single token there: nothing was trained to stop by it
        return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind an answer; None without a template, or such a token."""
    template = own_template(tokenizer)
    try:
        return None if template is None else end_of_turn(tokenizer, template)
    except ConfigError:
        return None


def stored_ends(directory: Path) -> set[int]:
    """The ends that a model directory names for generation."""
    for name in (GENERATION_CONFIG, "config.json"):
        fields = read_json(directory / name) if (directory / name).exists() else {}
        ends = fields.get("eos_token_id")
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    return set()


def write_ends(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Have `generate`, and servers that read the same file, stop where an answer ends, and pad with the pad token."""
    path = directory / GENERATION_CONFIG
    fields: dict[str, Any] = read_json(path) if path.exists() else {}
    fields.pop("_from_model_config", None)  # it is no copy of config.json any more
    ends = sorted(stored_ends(directory) | set(known_ends(tokenizer)))
    if ends:
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if tokenizer.pad_token_id is not None:
        fields["pad_token_id"] = tokenizer.pad_token_id
    atomic_write(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def begin_with_bos(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Have the tokenizer in `directory` begin texts with its start token by itself, as the documents of training do."""
    backend = tokenizer.backend_tokenizer
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]:
        return
    start = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    before = backend.post_processor
    backend.post_processor = start if before is None else processors.Sequence([before, start])
    save_tokenizer(tokenizer, directory)
