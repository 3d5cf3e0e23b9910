"""Text from a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from trainway.checkpoint.adapter import is_adapter
from trainway.checkpoint.weights import is_in_pieces, load_model
from trainway.models.causal_lm import CausalLMLoss
from trainway.release.bundle import adapter_base, model_directory
from trainway.training.evaluate import continue_prompts, text_prompt


def generate_text(
    model: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 42
) -> str:
    """Continue a prompt with the model of a run, a checkpoint or a model directory; greedy at temperature 0.

    Raises:
        ConfigError: no model there.
    """
    loaded, tokenizer = load_causal_lm(model_directory(model))
    if torch.cuda.is_available():
        loaded.to("cuda")
    samples = continue_prompts(
        CausalLMLoss(loaded),
        tokenizer,
        [text_prompt(tokenizer, prompt)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return next(iter(samples))["text"]


def load_causal_lm(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fp32 model and the tokenizer of a local model directory, loaded by plain transformers; one in pieces by us.

    An adapter comes with its base, which its configuration names.

    Raises:
        ConfigError: the base of an adapter was not found.
        DataError: a piece is missing or damaged.
    """
    disable_progress_bar()  # a local file is read in a moment
    if is_adapter(directory):
        from trainway.models.merge import load_adapted  # peft takes its time

        base = adapter_base(directory)
        home = directory if (directory / "tokenizer_config.json").exists() else base.directory
        tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
        return load_adapted(directory, base, torch.float32), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not is_in_pieces(directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        return model, tokenizer
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    load_model(model, directory)
    return model.eval(), tokenizer
