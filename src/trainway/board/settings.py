"""The configuration of a run as the board needs it: every setting by its key, and the few that the list shows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from trainway.board.masking import Masker
from trainway.config.schema import RunConfig, WatchdogConfig
from trainway.config.source import parse_yaml
from trainway.errors import UserError
from trainway.planning.arithmetic import count_parameters, padded_vocab_size
from trainway.planning.gad import gad_stages

MOST_BYTES = 256 << 10
DEEPEST = 40
"""Brackets within brackets: a reader of YAML takes time by the square of them, and no configuration has five."""
_LONGEST_VALUE = 2000


@dataclass(frozen=True)
class Settings:
    """A configuration, or what could be read of one that is damaged or of another version."""

    flat: dict[str, str] = field(default_factory=dict)
    """Every setting by its dotted key, as text, secrets masked."""
    recipe: str = ""
    model: str = ""
    total_steps: int | None = None
    stall_s: float = WatchdogConfig().stall_s
    description: str = ""
    problem: str = ""


def read_settings(content: bytes, masker: Masker) -> Settings:
    """The configuration that a run directory holds. Never raises: `problem` says what is wrong."""
    if len(content) >= MOST_BYTES:
        return Settings(problem="config.yaml is too large to be a configuration")
    if _depth(content) > DEEPEST:
        return Settings(problem="config.yaml is nested too deeply to be a configuration")
    try:
        found = {
            setting.path: setting.value
            for setting in parse_yaml(content.decode("utf-8", "replace"), "config.yaml")
        }
    except UserError as error:
        return Settings(problem=masker.text(": ".join(part for part in (error.what, error.why) if part)))
    flat = {
        ".".join(path): masker.setting(".".join(path), _shown(value))[:_LONGEST_VALUE]
        for path, value in found.items()
    }
    config, problem = _validated(found)
    if config is None:
        steps = found.get(("train", "total_steps"))
        return Settings(
            flat=flat,
            recipe=flat.get("recipe", ""),
            model=_last_name(flat.get("model.path", "")) or flat.get("model.architecture", ""),
            total_steps=steps if type(steps) is int and 0 < steps < 1 << 53 else None,
            problem=problem,
        )
    return Settings(
        flat=flat,
        recipe=f"{config.recipe} with adapters" if config.lora.enabled else config.recipe,
        model=masker.text(_model(config)),
        total_steps=_total_steps(config),
        stall_s=config.watchdog.stall_s,
        description=masker.text(config.description),
    )


def _depth(content: bytes) -> int:
    deepest = depth = 0
    for bracket in re.findall(rb"[\[\]{}]", content):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _validated(found: dict[tuple[str, ...], Any]) -> tuple[RunConfig | None, str]:
    nested: dict[str, Any] = {}
    for path, value in found.items():
        inside = nested
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                return None, "config.yaml contradicts itself"
        inside[path[-1]] = value
    try:
        return RunConfig.model_validate(nested), ""
    except (ValueError, UserError):
        return None, "config.yaml is not a configuration of this version"


def _total_steps(config: RunConfig) -> int | None:
    """Where the settings say it; with epochs, the log does."""
    if config.recipe != "gad":
        return config.train.total_steps
    stages = gad_stages(config) if config.train.global_batch_size else None
    return stages[-1].last if stages else None


def _model(config: RunConfig) -> str:
    if config.model.path is not None:
        return _last_name(config.model.path)
    try:
        vocab_size = config.model.vocab_size or padded_vocab_size(config.tokenizer.vocab_size)
        return f"{config.model.architecture} {_size(count_parameters(config.model, vocab_size).total)}"
    except (ArithmeticError, ValueError, UserError):
        return config.model.architecture


def _size(parameters: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return str(parameters)


def _last_name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case _:
            return str(value)
