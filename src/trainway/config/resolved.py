"""What a resolved configuration is written as, compared by, and described with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from trainway.config.mixes import plain_source
from trainway.config.rules import ignored_settings
from trainway.config.schema import RunConfig

CHANGEABLE = (
    "description",
    "name",
    "runs_dir",
    "run_dir",
    "log.",
    "tracking.",
    "checkpoint.",
    "eval.",
    "engine.",
    "release.",
    "watchdog.",
    "train.micro_batch_size",
    "train.grad_accum_steps",
    "train.num_threads",
    "train.compile",
    "train.activation_checkpointing",
    "train.loss_chunk_tokens",
    "data.prefetch_steps",
    "data.store_dir",
)
"""Settings (sections end with a dot) that may differ when a run goes on: none of them alters what is learnt."""


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML in the order of the schema: `load_config` of it gives the same run.

    Settings that this run ignores are left out, because a file that sets them is refused.
    """
    nested = config.model_dump(mode="json")
    nested["data"]["train"] = [plain_source(entry) for entry in nested["data"]["train"]]
    for key in ignored_settings(config):
        section, _, leaf = key.rpartition(".")
        del nested[section][leaf]
    text: str = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=110)
    return text


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, with every setting's description, bounds and default."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    # resolved before validation, so not part of RunConfig
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A preset's name, or a file relative to this one, whose settings lie below these.",
    }
    return schema


def flat_config(config: RunConfig) -> dict[str, Any]:
    """Every setting by dotted key as plain JSON values, in the order of the schema."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{leaf}": item for leaf, item in value.items()}
        else:
            flat[name] = value
    flat["data.train"] = [plain_source(entry) for entry in flat["data.train"]]
    return flat


def fingerprint(config: RunConfig, global_batch_size: int | None = None) -> dict[str, Any]:
    """The settings that must stay the same when a run goes on, by dotted key.

    `global_batch_size`: the resolved one (rows), so that the same batch spread over other ranks compares equal.
    """
    ignored = ignored_settings(config)
    kept = {
        key: value
        for key, value in flat_config(config).items()
        if key not in ignored
        and not any(key == c or (c.endswith(".") and key.startswith(c)) for c in CHANGEABLE)
    }
    kept["data.train"] = [_without_names(entry) for entry in kept["data.train"]]
    if global_batch_size is not None:
        kept["train.global_batch_size"] = global_batch_size
    return kept


def _without_names(entry: Any) -> Any:
    # neither what a source is called nor that it might be absent alters what is learnt
    return (
        entry if isinstance(entry, str) else {k: v for k, v in entry.items() if k not in ("name", "optional")}
    )


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line `key: old -> new` for every key in which two fingerprints differ; `absent` where one lacks it."""
    keys = list(dict.fromkeys([*old, *new]))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in keys
        if (key in old) != (key in new) or old.get(key) != new.get(key)
    ]
