"""Text from a trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainway.release.bundle import model_directory
from trainway.training.evaluate import continue_prompts


def generate_text(
    model: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 42
) -> str:
    """Continue a prompt with the model of a run, a checkpoint or a model directory; greedy at temperature 0.

    Raises:
        ConfigError: no model there.
    """
    directory = model_directory(model)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if torch.cuda.is_available():
        loaded.to("cuda")
    samples = continue_prompts(
        loaded, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    return next(iter(samples))["text"]
