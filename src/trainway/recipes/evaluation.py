"""Evaluate a run, a checkpoint or any causal language model on held-out text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainway.config.schema import RunConfig, TokenizerConfig, TrainConfig
from trainway.data.conversations import longest_row
from trainway.data.loader import validation_batches
from trainway.data.prepare import prepare
from trainway.data.store import TokenStore
from trainway.engines import choose_precision
from trainway.engines.world import open_world
from trainway.errors import ConfigError
from trainway.models.attention_choice import use_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.release.bundle import model_directory
from trainway.release.generate import load_causal_lm
from trainway.run_dir import RunDir
from trainway.training.evaluate import chat_prompt, continue_prompts, evaluate_batches, text_prompt


def evaluate(
    target: str | Path,
    *,
    data: Sequence[str] = (),
    prompts: Sequence[str] = (),
    max_tokens: int | None = None,
    seq_len: int | None = None,
    answers: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Validation loss, perplexity and bits per byte of a run (its best checkpoint), a checkpoint or a model directory.

    Args:
        data: files to evaluate on; empty means the run's own validation split.
        prompts: continued and returned under "samples".
        max_tokens: read at most this many tokens; None reads all.
        seq_len: tokens in a row; None means as trained, or 512 for a model without a run.
        answers: `data` holds conversations of which the answers count, and prompts are a user's turns; a run of the
            recipe sft or gad knows that itself.

    Raises:
        ConfigError: no model there, or neither data nor a run whose validation split could be used.
        DataError: the data is missing or malformed.
    """
    directory = model_directory(target)
    model, tokenizer = load_causal_lm(directory)
    config = _run_config(target)
    base = config or RunConfig(recipe="sft" if answers else "pretrain")
    longest = getattr(model.config, "max_position_embeddings", 2**31)
    seq_len = seq_len or (longest_row(config) if config else min(512, longest))
    with tempfile.TemporaryDirectory() as scratch, open_world(base.engine) as world:
        store = _store(target, config, base, directory, data, scratch, seq_len)
        packing = base.data.packing
        use_attention(model, base.model.attention, packed=packing != "none", device=world.device)
        model.to(world.device)
        batches = validation_batches(
            store.split("val"),
            seq_len=seq_len,
            micro_batch_size=base.train.micro_batch_size,
            packing=packing,
            max_tokens=max_tokens,
            rank=world.rank,
            world_size=world.world_size,
        )
        module = CausalLMLoss(model, chunk_tokens=base.train.loss_chunk_tokens)
        precision = choose_precision(base.train.precision, world.device)
        result: dict[str, Any] = evaluate_batches(module, batches, store.token_bytes, world, precision)
        if prompts:
            as_prompt = text_prompt if base.recipe == "pretrain" else chat_prompt
            samples = continue_prompts(
                module,
                tokenizer,
                [as_prompt(tokenizer, prompt) for prompt in prompts],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=base.seed,
            )
            result["samples"] = list(samples)
    return result


def _run_config(target: str | Path) -> RunConfig | None:
    path = RunDir(Path(target)).config
    return RunConfig.model_validate(yaml.safe_load(path.read_text())) if path.exists() else None


def _store(
    target: str | Path,
    config: RunConfig | None,
    base: RunConfig,
    directory: Path,
    data: Sequence[str],
    scratch: str,
    seq_len: int,
) -> TokenStore:
    if not data and config is not None:
        prepared = prepare(config, tokenizer_dir=directory if config.model.path else None)
        return TokenStore.open(prepared.store_dir, verify=False)  # prepare verifies
    if not data:
        raise ConfigError(
            f"there is nothing to evaluate {target} on",
            "it is not a run directory, so it has no validation split of its own",
            "name a file: --data FILE",
        )
    sources = tuple(data)
    given = RunConfig(
        recipe=base.recipe,
        data=base.data.model_copy(update={"train": sources, "validation": sources, "store_dir": scratch}),
        tokenizer=TokenizerConfig(path=str(directory)),
        train=TrainConfig(total_steps=1, seq_len=seq_len),
    )
    return TokenStore.open(prepare(given).store_dir, verify=False)
