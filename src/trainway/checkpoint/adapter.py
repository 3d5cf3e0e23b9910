"""The adapter of an adapted model on disk: peft's file names, tensor names and configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainway.checkpoint.pieces import Piece

ADAPTER_STEM = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"
"""Under which peft keeps the one adapter of a model in memory; files do not name it."""

_PREFIX = "base_model.model."
_COPY = f".modules_to_save.{ADAPTER_NAME}."


def adapter_config(model: torch.nn.Module) -> Any | None:
    """peft's configuration of the adapter that was injected into `model`; None for a plain model."""
    return getattr(model, "peft_config", {}).get(ADAPTER_NAME)


def is_adapter(directory: Path) -> bool:
    """Whether a model directory holds an adapter, and its base is elsewhere."""
    return (directory / ADAPTER_CONFIG).exists()


def saved_pieces(model: torch.nn.Module, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """What of `pieces`, by parameter name, a checkpoint holds, by the name that it has there.

    Of an adapted model the trained parameters under peft's names; of any other one everything as it is.
    """
    if adapter_config(model) is None:
        return dict(pieces)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {saved_name(name): piece for name, piece in pieces.items() if name in trained}


def saved_name(name: str) -> str:
    """The name in peft's files of a trained parameter of an adapted model."""
    if _COPY in name:
        return _PREFIX + name.replace(_COPY, ".")
    module, _, kind = name.rpartition(f".{ADAPTER_NAME}.")
    if module.endswith(".lora_magnitude_vector"):
        return _PREFIX + module
    return f"{_PREFIX}{module}.{kind}"


def base_name(name: str) -> str:
    """The name in the base model of a parameter that an adapted model has from there."""
    name = name.replace(_COPY, ".").replace(".original_module.", ".")
    return re.sub(r"\.base_layer(?=\.)", "", name)  # parameters with an adapter are wrapped once for each


def is_adapter_tensor(name: str) -> bool:
    """Whether a parameter of an adapted model is one that its base does not have."""
    return re.search(r"\.lora_(A|B|magnitude_vector)\.", name) is not None


def write_adapter_config(model: torch.nn.Module, directory: Path) -> None:
    """Write the configuration with which peft finds the base and injects the adapter. Raises OSError of the disk."""
    config = adapter_config(model)
    assert config is not None
    # sets have no order, and files are compared by their bytes
    fields = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }
    fields["inference_mode"] = True
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
