"""Finished runs for the tests of what leaves them: tiny models with a byte-level tokenizer that can read anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.base_models import tiny_model
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import write_model
from trainway.config.schema import TokenizerConfig
from trainway.data.chat_template import load_template
from trainway.data.tokenizer import train_tokenizer

TEXTS = (
    "def area(width, height): return width * height",
    "the quick brown fox jumps over the lazy dog",
    "What is the capital of France? The capital of France is Paris.",
)
SIZES: dict[str, Any] = {"vocab_size": 320, "intermediate_size": 64, "max_position_embeddings": 256}


def tokenizer(directory: Path, *, chat: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; for chats with ChatML, whose turns end with <|im_end|>, not with <|eos|>."""
    special = ("<|im_start|>", "<|im_end|>") if chat else ()
    config = TokenizerConfig(vocab_size=300, special_tokens=special)
    made = train_tokenizer(TEXTS * 3, config, directory)
    if chat:
        made.chat_template = load_template(made, "chatml").text
    return made


def finished_run(
    root: Path, family: str = "llama", *, recipe: str = "sft", steps: int = 1, **model: Any
) -> tuple[Path, PreTrainedModel]:
    """A run with checkpoints of a whole model, and the model of the last one."""
    saved = tokenizer(root / "tokenizer", chat=recipe == "sft")
    ids = {"bos_token_id": saved.bos_token_id, "eos_token_id": saved.eos_token_id, "pad_token_id": None}
    if family in ("llama", "gpt_oss"):
        ids["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    trained = tiny_model(family, **{**SIZES, **ids, **model})
    store = CheckpointStore(root / "run" / "checkpoints", keep_last=10)
    for step in range(1, steps + 1):
        store.save(step, lambda temp: write_model(trained, temp / "model", saved), best=step == steps)
    (root / "run" / "config.yaml").write_text(
        yaml.safe_dump({"recipe": recipe, "data": {"store_dir": str(root / "cache")}})
    )
    return root / "run", trained
