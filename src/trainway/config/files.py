"""A run's configuration as two files, YAML and TOML, that load to the same run."""

from __future__ import annotations

from typing import Any

import yaml

from trainway.config.names import field_table
from trainway.config.resolved import dump_config
from trainway.config.schema import RunConfig


def config_values(config: RunConfig) -> dict[str, Any]:
    """The settings of `config` as plain nested values, without those that are empty by default.

    TOML has no null: where emptiness is not the default, it is the word `none`, which `load_config` knows.
    """
    values: dict[str, Any] = {}
    for name, value in yaml.safe_load(dump_config(config)).items():
        if isinstance(value, dict):
            section = {leaf: _written(f"{name}.{leaf}", item) for leaf, item in value.items()}
            values[name] = {leaf: item for leaf, item in section.items() if item is not None}
        elif (item := _written(name, value)) is not None:
            values[name] = item
    return values


def yaml_text(values: dict[str, Any]) -> str:
    """The file training.yaml."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return text


def toml_text(values: dict[str, Any]) -> str:
    """The file training.toml."""
    import tomli_w

    # a key after a table would belong to the table
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    return tomli_w.dumps({**plain, **values})


def _written(key: str, value: Any) -> Any:
    if value is None and field_table()[key].default is not None:
        return "none"
    return value
