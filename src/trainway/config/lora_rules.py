"""What must hold for `lora`: contradictions of its settings, and what the rest of a run must be for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from trainway.config.schema import LoraConfig, RunConfig
from trainway.errors import ConfigError


class Contradiction(NamedTuple):
    """Two settings that cannot both hold."""

    key: str
    other: str
    what: str
    why: str
    fix: str


def contradictions(lora: LoraConfig) -> Iterator[Contradiction]:
    """What `lora` says that no model can be given."""
    if lora.target_parameters and lora.dropout > 0:
        yield Contradiction(
            "lora.dropout", "lora.target_parameters",
            f"lora.dropout is {lora.dropout:g} with lora.target_parameters",
            "the adapter of a bare parameter, such as experts, is added to the parameter, and sees no input to drop",
            "set lora.dropout=0",
        )  # fmt: skip
    if lora.target_parameters and lora.use_dora:
        yield Contradiction(
            "lora.use_dora", "lora.target_parameters",
            "lora.use_dora with lora.target_parameters",
            "DoRA is there for modules, not for bare parameters",
            "take one of the two out",
        )  # fmt: skip
    if lora.quantize != "none" and lora.use_dora:
        yield Contradiction(
            "lora.use_dora", "lora.quantize",
            f"lora.use_dora with lora.quantize={lora.quantize}",
            "DoRA's magnitudes begin as norms of weights in full precision",
            "turn one of them off",
        )  # fmt: skip
    if not (lora.target_modules or lora.target_parameters or lora.modules_to_save):
        yield Contradiction(
            "lora.target_modules", "lora.target_parameters",
            "lora.target_modules and lora.target_parameters are empty",
            "nothing would be trained",
            "name at least one, e.g. lora.target_modules=q_proj,v_proj or all-linear",
        )  # fmt: skip


def lora_problems(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    """Every rule on adapters that `config` breaks, with where each setting was made."""
    lora, engine = config.lora, config.engine.name
    problems: list[ConfigError] = []
    if not lora.enabled:
        return problems
    if config.model.path is None and config.recipe != "sft":
        problems.append(
            ConfigError(
                f"{origins['lora.enabled']}: lora has no model to adapt",
                "model.path is empty, and a new model has nothing worth freezing",
                "set model.path, or lora=false",
            )
        )
    if lora.quantize != "none" and engine in ("fsdp", "zero2", "zero3"):
        problems.append(
            ConfigError(
                f"{origins['lora.quantize']}: lora.quantize is {lora.quantize}",
                f"engine.name is {engine} ({origins['engine.name']}), and packed weights cannot be cut into parts",
                "use engine.name=ddp, or lora.quantize=none",
            )
        )
    for key, other, what, why, fix in contradictions(lora):
        problems.append(ConfigError(f"{origins[key]}: {what}", f"{why} ({other}: {origins[other]})", fix))
    return problems
