"""From a preset or a file, the environment and `key=value` words to one validated RunConfig that knows its origins."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainway.config.aliases import SECRETS, SOURCES
from trainway.config.mixes import entry_errors
from trainway.config.names import (
    Assignment,
    assign,
    field_table,
    is_refused,
    secret_error,
    stands_alone,
    takes_several,
)
from trainway.config.resolved import config_difference, config_schema, dump_config, fingerprint
from trainway.config.rules import broken_rules
from trainway.config.schema import RunConfig
from trainway.config.source import Layer, Setting, flatten, preset_names, preset_text, read_layers
from trainway.errors import ConfigError

__all__ = [
    "LoadedConfig",
    "config_difference",
    "config_schema",
    "dump_config",
    "fingerprint",
    "load_config",
    "preset_names",
    "preset_text",
]

ENVIRONMENT = {
    "RUN_EXPERIMENT": "name",
    "TRAINWAY_RUNS_DIR": "runs_dir",
    "TRAINWAY_STORE_DIR": "data.store_dir",
    "TRAIN_BACKEND": "engine.name",
    "PUSH_TO_HUB": "release.push_to_hub",
    "RUN_EVALUATION": "eval.after_training",
}
"""Environment variables that set something in the configuration."""

EXCLUSIVE = (
    ("train.total_steps", "train.epochs"),
    ("train.global_batch_size", "train.grad_accum_steps"),
    ("schedule.warmup_steps", "schedule.warmup_ratio"),
)
"""Pairs of which the higher layer's one displaces the other: `epochs=1` over a preset with total_steps."""


_TOKEN = re.compile(r"(hf_|api_org_|rpa_|ghp_|github_pat_|sk-)[A-Za-z0-9_]{30,}")
_SETTING = re.compile(r"--|[A-Za-z][\w.-]*=")


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration and where each of its values came from."""

    config: RunConfig
    origins: dict[str, str]
    """Dotted key of every setting → `default`, `preset NAME`, `FILE:line`, `environment VAR` or `command line`."""
    source_name: str
    explicit: frozenset[str]
    """Keys that the user set for this run: in the file, the environment or on the command line."""


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    environ: Mapping[str, str] = os.environ,
) -> LoadedConfig:
    """Resolve a preset's name, a .yaml or .toml file or a dict; precedence as in `LoadedConfig.origins`, rising.

    `overrides`: `key=value`, `--key value` or `--key=value` words, or a dict. Raises ConfigError naming every
    wrong setting at once, each with its file and line.
    """
    layers = [*read_layers(source), _environment_layer(environ), _override_layer(overrides)]
    state = _Merge()
    for layer in layers:
        state.apply(layer)
    _shorten_warmup(state)
    _fit_offload(state)
    config, wrong_values = _validate(state.values)
    raise_all([*state.problems, *wrong_values])
    assert config is not None
    origins = {key: state.values[key].origin if key in state.values else "default" for key in field_table()}
    raise_all(broken_rules(config, origins, frozenset(state.explicit)))
    return LoadedConfig(config, origins, layers[-3].name, frozenset(state.explicit))


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    found = [
        Setting(tuple(key.split(".")), environ[variable], f"environment {variable}")
        for variable, key in ENVIRONMENT.items()
        if environ.get(variable)
    ]
    return Layer("environment", found)


def _override_layer(overrides: Sequence[str] | Mapping[str, Any]) -> Layer:
    if isinstance(overrides, Mapping):
        return Layer("overrides", flatten(overrides, "overrides"))
    if isinstance(overrides, str):
        overrides = [overrides]
    words = [str(word) for word in overrides]
    _refuse_secrets(words)
    found: list[Setting] = []
    while words:
        key, value = _next_override(words)
        found.append(Setting(tuple(key.replace("-", "_").split(".")), value, "command line"))
    return Layer("command line", found)


def _refuse_secrets(words: Sequence[str]) -> None:
    """Raise ConfigError for a token, before any other message could repeat it."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        leaf = name.replace("-", "_").rpartition(".")[2]
        if leaf in SECRETS and (word.startswith("--") or "=" in word):
            raise secret_error(leaf, "command line")
        if _TOKEN.fullmatch(value) or _TOKEN.fullmatch(word):
            raise secret_error(leaf if value else "a token", "command line")


def _next_override(words: list[str]) -> tuple[str, Any]:
    """Take one setting off the front of `words`."""
    word = words.pop(0)
    body = word.removeprefix("--")
    key, equals, value = body.partition("=")
    if not re.fullmatch(r"[A-Za-z][\w.-]*", key) or (not equals and body == word):
        raise ConfigError(
            f"command line: cannot read the argument {word!r}",
            "settings are key=value or --key value",
            "e.g. optim.lr=1e-3",
        )
    if equals:
        return key, value
    follows = words[0] if words else None
    if stands_alone(key, follows):
        return key, True
    if key[:3] in ("no-", "no_") and stands_alone(key[3:], None):
        return key[3:], False
    if follows is not None and not follows.startswith("--"):
        first = words.pop(0)
        further: list[str] = []
        while takes_several(key) and words and not _SETTING.match(words[0]):
            further.append(words.pop(0))
        return key, [first, *further] if further else first
    if is_refused(key):  # the answer says more than that a value is missing
        return key, ""
    raise ConfigError(f"command line: {word} has no value", "a setting needs one", f"write {word}=VALUE")


@dataclass
class _Merge:
    """The layers applied so far, and what was wrong with them."""

    values: dict[str, Assignment] = field(default_factory=dict)
    explicit: set[str] = field(default_factory=set)
    problems: list[ConfigError] = field(default_factory=list)

    def apply(self, layer: Layer) -> None:
        chosen = self._collect(layer)
        for pair in EXCLUSIVE:
            present = [key for key in pair if key in chosen and chosen[key].value is not None]
            if len(present) == 1:
                displaced = pair[1 - pair.index(present[0])]
                self.values.pop(displaced, None)
                self.explicit.discard(displaced)
            elif len(present) == 2 and pair[0] == "train.total_steps":
                first, second = (chosen[key] for key in pair)
                self.problems.append(
                    ConfigError(
                        f"{second.origin}: {second.written} and {first.written} are both set",
                        "each of them decides the length of the run",
                        "keep one of the two",
                    )
                )
        self._switch_lora(chosen)
        for key, assignment in sorted(chosen.items(), key=lambda item: item[0][-1].isdigit()):
            target = key
            if key[-1].isdigit():
                target, assignment = self._place(assignment)
            self.values[target] = assignment
            silent = assignment.implied or (assignment.weak and key.startswith("lora."))
            if layer.explicit and assignment.value is None:
                self.explicit.discard(target)
            elif layer.explicit and not silent:
                self.explicit.add(target)

    def _switch_lora(self, chosen: dict[str, Assignment]) -> None:
        """Any setting of lora turns it on, unless its layer says otherwise; off, it takes the lower layers' with it."""
        if (switch := chosen.get("lora.enabled")) is not None:
            if switch.value is False:
                self.explicit = {key for key in self.explicit if not key.startswith("lora.")}
            return
        first = next(
            (item for key, item in chosen.items() if key.startswith("lora.") and not item.weak), None
        )
        if first is not None:
            chosen["lora.enabled"] = Assignment(
                "lora.enabled", True, first.origin, first.written, implied=True
            )

    def _collect(self, layer: Layer) -> dict[str, Assignment]:
        """One assignment per key; two different ones in one layer are a problem."""
        chosen: dict[str, Assignment] = {}
        textual = layer.name in ("command line", "environment")
        for setting in layer.settings:
            try:
                new = assign(setting, textual=textual)
            except ConfigError as error:
                self.problems.append(error)
                continue
            if new is None:
                continue
            old = chosen.get(new.key)
            if old is None or (old.weak and not new.weak):
                chosen[new.key] = new
            elif not new.weak and _plain(old.value) != _plain(new.value):
                self.problems.append(
                    ConfigError(
                        f"{new.origin}: {new.written} says {new.value!r}, {old.written} ({old.origin}) says {old.value!r}",
                        f"both set {new.key}",
                        "keep one of the two",
                    )
                )
        for key, item in chosen.items():
            head, _, place = key.rpartition(".")
            whole = chosen.get(head) if place.isdigit() else None
            if (
                whole
                and isinstance(whole.value, list | tuple)
                and _plain(whole.value)[int(place) : int(place) + 1] != [item.value]
            ):
                self.problems.append(
                    ConfigError(
                        f"{item.origin}: {item.written} says {item.value!r}, {whole.written} says {_plain(whole.value)!r}",
                        f"both set {head}",
                        "keep one of the two",
                    )
                )
        return chosen

    def _place(self, item: Assignment) -> tuple[str, Assignment]:
        """`optim.betas.1 = 0.99` as a new value of optim.betas."""
        key, _, place = item.key.rpartition(".")
        current = self.values[key].value if key in self.values else field_table()[key].default
        items = list(current) if isinstance(current, list | tuple) else []
        if int(place) >= len(items):
            raise ConfigError(
                f"{item.origin}: {item.written} is not a setting",
                f"{key} has {len(items)} values",
                "correct it",
            )
        items[int(place)] = item.value
        return key, Assignment(key, items, item.origin, item.written)


def _shorten_warmup(state: _Merge) -> None:
    """A run shortened by the user keeps its schedule's shape: a preset's longer warm-up becomes a tenth of the run."""
    total = state.values.get("train.total_steps")
    if (
        total is None
        or "train.total_steps" not in state.explicit
        or "schedule.warmup_steps" in state.explicit
        or "schedule.warmup_ratio" in state.values
    ):
        return
    set_before = state.values.get("schedule.warmup_steps")
    steps = set_before.value if set_before else field_table()["schedule.warmup_steps"].default
    if isinstance(total.value, int) and isinstance(steps, int) and steps >= total.value > 0:
        origin = f"train.total_steps / 10 ({set_before.origin if set_before else 'default'}: {steps})"
        state.values["schedule.warmup_steps"] = Assignment(
            "schedule.warmup_steps", total.value // 10, origin, "schedule.warmup_steps"
        )


def _fit_offload(state: _Merge) -> None:
    """An engine chosen over a preset's takes what it can offload: the optimiser's state alone, or with the weights."""
    engine, offload = state.values.get("engine.name"), state.values.get("engine.cpu_offload")
    if engine is None or offload is None or "engine.cpu_offload" in state.explicit:
        return
    fitting = {("fsdp", "optimizer"): "all", ("zero2", "all"): "optimizer"}.get((engine.value, offload.value))
    if fitting is not None:
        origin = f"engine.name is {engine.value} ({offload.origin}: {offload.value})"
        state.values["engine.cpu_offload"] = Assignment(offload.key, fitting, origin, offload.key)


def _validate(values: Mapping[str, Assignment]) -> tuple[RunConfig | None, list[ConfigError]]:
    nested: dict[str, Any] = {}
    for key, assignment in values.items():
        section, _, leaf = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[leaf] = assignment.value
    try:
        return RunConfig.model_validate(nested), []
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        entries: list[tuple[tuple[str | int, ...], str]] = []
        for item in error.errors(include_url=False):
            # the place goes on into a tuple or a union's member; the setting ends where the schema's field does
            place = [str(part) for part in item["loc"]]
            key = ".".join(place[:2]) if ".".join(place[:2]) in field_table() else place[0]
            message = item["msg"].replace("Input should be ", "").removeprefix("a valid ")
            if key == SOURCES:
                entries.append((item["loc"][2:], message))
            else:
                messages.setdefault(key, []).append(message)
        wrong = [_value_error(values[key], found) for key, found in messages.items()]
        if entries:
            wrong += entry_errors(values[SOURCES].value, values[SOURCES].origin, entries)
        return None, wrong


def _value_error(assignment: Assignment, messages: Iterable[str]) -> ConfigError:
    info = field_table()[assignment.key]
    spelled = "" if assignment.written == assignment.key else f" (written {assignment.written})"
    default = "empty" if info.default in (None, (), {}) else info.default
    return ConfigError(
        f"{assignment.origin}: {assignment.key}{spelled} is {_plain(assignment.value)!r}",
        f"it must be {' or '.join(dict.fromkeys(messages))}",
        f"{info.description or 'see the schema'} Default: {default}.",
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def raise_all(
    problems: Sequence[ConfigError],
    what: str = "settings are wrong",
    cure: str = "correct them; `trainway config schema` lists every setting",
) -> None:
    """Raise one error for all `problems`, or none when there are none. `what`: said behind their number."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"  {p.what}; {'; '.join(part for part in (p.why, p.fix) if part)}" for p in problems]
    raise ConfigError(f"{len(problems)} {what}", "\n".join(["", *lines]), cure)
