"""Trainway takes a language model the whole way, from data to release, and wastes no GPU hour."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainway.config.load import load_config
    from trainway.data.prepare import prepare
    from trainway.launch.bench import bench_here as bench
    from trainway.launch.local import train_here as train
    from trainway.planning.plan import plan
    from trainway.recipes.evaluation import evaluate
    from trainway.release.bundle import export

__version__ = "0.1.0"

__all__ = ["__version__", "bench", "evaluate", "export", "load_config", "plan", "prepare", "train"]

# Resolved on first use: `import trainway` must not cost a script that only plans the import of torch.
_HOMES = {
    "load_config": ("trainway.config.load", "load_config"),
    "plan": ("trainway.planning.plan", "plan"),
    "prepare": ("trainway.data.prepare", "prepare"),
    "train": ("trainway.launch.local", "train_here"),
    "bench": ("trainway.launch.bench", "bench_here"),
    "evaluate": ("trainway.recipes.evaluation", "evaluate"),
    "export": ("trainway.release.bundle", "export"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainway' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
