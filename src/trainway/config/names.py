"""Every name a setting may be called by: its dotted path, its bare name, and what other tools call it."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainway.config.aliases import (
    ALIASES,
    BARE,
    OBSOLETE,
    SECRETS,
    SECTION_VALUES,
    SOURCES,
    SWITCHES,
    VALUES,
    WORD_SWITCHES,
)
from trainway.config.mixes import check_fields
from trainway.config.schema import RunConfig
from trainway.config.source import Setting, parse_scalar
from trainway.errors import ConfigError


@dataclass(frozen=True)
class Assignment:
    """A value for one field. `key` is dotted; a last part that is a number is a place in a tuple."""

    key: str
    value: Any
    origin: str
    written: str
    weak: bool = False
    """`bf16: false` says fp32 only when nothing else in its layer sets the precision; `load_in_4bit: false` asks for
    no adapters."""
    implied: bool = False
    """Set by another setting of its layer, not written itself."""


@functools.cache
def field_table() -> dict[str, FieldInfo]:
    """Every setting of RunConfig by dotted path, in the order of the schema."""
    table: dict[str, FieldInfo] = {}
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            table |= {f"{name}.{leaf}": leaf_info for leaf, leaf_info in info.annotation.model_fields.items()}
        else:
            table[name] = info
    return table


def assign(setting: Setting, *, textual: bool = False) -> Assignment | None:
    """The field that `setting` means and its value; None for an empty section.

    `textual`: the value is raw text from a command line or the environment. Raises ConfigError for a name that is
    unknown, ambiguous or obsolete, and for a value that is no setting.
    """
    written = ".".join(part.replace("-", "_") for part in setting.path)
    value = setting.value
    leaf = written.rpartition(".")[2]
    if leaf in SECRETS:
        raise secret_error(leaf, setting.origin)
    if written in _sections():
        if value is None or value == {}:
            return None
        key = _section_key(setting, written)
    else:
        key = _resolve(written, setting.origin)
    info = field_table().get(key)
    if textual:
        value = _parse_words(value, info.annotation if info and leaf not in SWITCHES else None)
    if (leaf, value) == ("adapter", "qlora"):
        return Assignment("lora.quantize", "4bit", setting.origin, written)
    if leaf in SWITCHES:
        return _switch(setting, key, written, value)
    if isinstance(value, bool) and key in WORD_SWITCHES:
        value = WORD_SWITCHES[key][0 if value else 1]
    for table in (VALUES.get(key, {}), VALUES.get(leaf, {})):
        # a comma list of one word is that word
        alone = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        if isinstance(alone, str | int | None) and alone in table:
            value = table[alone]
    if info is not None:
        value = _fit(setting, key, written, value, info.annotation)
    weak = (key, value) == ("lora.quantize", "none")
    return Assignment(key, value, setting.origin, written, weak)


def stands_alone(name: str, follows: str | None) -> bool:
    """Whether `--name`, with `follows` after it on the command line, means true by itself."""
    written = name.replace("-", "_")
    if follows is not None and follows.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        return False
    if written.rpartition(".")[2] in SWITCHES:
        return True
    key = _known(written)
    if key in WORD_SWITCHES:
        return follows not in _words(field_table()[key].annotation)
    return key is not None and bool in _kinds(field_table()[key].annotation)


def takes_several(name: str) -> bool:
    """Whether a setting is a list, so that `--name a b c` gives it three values."""
    key = _known(name.replace("-", "_"))
    return key is not None and tuple in _kinds(field_table()[key].annotation)


def is_refused(name: str) -> bool:
    """Whether a name is no setting but has an answer of its own."""
    leaf = name.replace("-", "_").rpartition(".")[2]
    return leaf in SECRETS or (leaf in OBSOLETE and _known(name.replace("-", "_")) is None)


def secret_error(name: str, origin: str) -> ConfigError:
    """What is wrong with a token where settings are; its value is not repeated."""
    service = next((word for word in ("wandb", "runpod", "mlflow") if word in name), "")
    cure = {
        "wandb": "set WANDB_API_KEY",
        "runpod": "set RUNPOD_API_KEY",
        "mlflow": "set MLFLOW_TRACKING_PASSWORD",
    }.get(service, "set HF_TOKEN or run `hf auth login`")
    if origin == "command line":
        why = "every user of this machine can read a command line, and shells keep it"
        cure += " instead; then revoke the token that you wrote here"
    else:
        why = "a configuration is copied into run directories, reports and repositories"
        cure += " instead"
    return ConfigError(f"{origin}: {name} is a secret, not a setting", why, cure)


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(key.partition(".")[0] for key in field_table() if "." in key)


@functools.cache
def _by_leaf() -> dict[str, tuple[str, ...]]:
    leaves: dict[str, tuple[str, ...]] = {}
    for key in field_table():
        leaf = key.rpartition(".")[2]
        leaves[leaf] = (*leaves.get(leaf, ()), key)
    return leaves


def _known(written: str) -> str | None:
    """The setting that `written` means, or None when it means none."""
    try:
        key = SECTION_VALUES.get(written) or _resolve(written, "")
    except ConfigError:
        return None
    return key if key in field_table() else None


def _resolve(written: str, origin: str) -> str:
    """The dotted path that `written` means."""
    table = field_table()
    if written in table:
        return written
    head, _, leaf = written.rpartition(".")
    if head in table and leaf.isdigit() and get_origin(table[head].annotation) is tuple:
        return written
    if written in ALIASES:
        return ALIASES[written]
    target = ALIASES.get(leaf)
    if target and (not head or target.startswith(f"{head}.")):
        return target
    where = f"{origin}: " if origin else ""
    if leaf in OBSOLETE:
        raise ConfigError(f"{where}{written} is not a setting", OBSOLETE[leaf], "replace it")
    if not head and leaf in BARE:
        return BARE[leaf]
    if not head and leaf in _by_leaf():
        keys = _by_leaf()[leaf]
        if len(keys) == 1:
            return keys[0]
        raise ConfigError(
            f"{where}{written} is ambiguous", f"it may mean {' or '.join(keys)}", "write the full name"
        )
    if written.startswith(f"{SOURCES}."):
        why = f"{SOURCES} is a list of sources, each a path or a table"
        raise ConfigError(
            f"{where}there is no setting {written!r}", why, f"write {SOURCES}: [{{path: FILE, weight: 2}}]"
        )
    nearest = _nearest(written)
    fix = f"did you mean {nearest}?" if nearest else "`trainway config schema` lists every setting"
    raise ConfigError(f"{where}there is no setting {written!r}", _section_note(head), fix)


def _nearest(written: str) -> str:
    """The known setting that `written` most likely means, or an empty string."""
    head, _, leaf = written.rpartition(".")
    if head not in _sections() and (close := difflib.get_close_matches(head, _sections(), n=1)):
        head = close[0]
        if f"{head}.{leaf}" in field_table():
            return f"{head}.{leaf}"
    if leaf in _by_leaf():
        return " or ".join(_by_leaf()[leaf])
    if leaf in ALIASES:
        return ALIASES[leaf]
    own = [key.rpartition(".")[2] for key in field_table() if key.startswith(f"{head}.")] if head else []
    if close := difflib.get_close_matches(leaf, own, n=1, cutoff=0.6):
        return f"{head}.{close[0]}"
    if head and (close := difflib.get_close_matches(written, field_table(), n=1, cutoff=0.75)):
        return close[0]
    names: Iterable[str] = [*_by_leaf(), *ALIASES, *(() if head else _sections())]
    if close := difflib.get_close_matches(leaf, names, n=1, cutoff=0.65):
        name = close[0]
        return " or ".join(_by_leaf()[name]) if name in _by_leaf() else ALIASES.get(name, name)
    return ""


def _section_note(head: str) -> str:
    if not head:
        return "unknown names are refused, so that a misspelt one cannot go unnoticed"
    if head in _sections():
        leaves = [key.rpartition(".")[2] for key in field_table() if key.startswith(f"{head}.")]
        return f"{head} has {', '.join(leaves)}"
    return f"there is no section {head!r}; the sections are {', '.join(sorted(_sections()))}"


def _section_key(setting: Setting, section: str) -> str:
    """The setting that a section means which is given one value."""
    key = SECTION_VALUES.get(section)
    kinds = {str, *_kinds(field_table()[key].annotation)} if key else set()
    value = setting.value
    if key is None or type(value) not in (kinds | {list} if tuple in kinds else kinds):
        raise _section_error(setting, section)
    return key


def _section_error(setting: Setting, section: str) -> ConfigError:
    others = [key for key in _by_leaf().get(section, ()) if key != section]
    fix = f"did you mean {' or '.join(others)}?" if others else f"write e.g. {_example(section)}"
    return ConfigError(
        f"{setting.origin}: {section} is {setting.value!r}",
        f"{section} is a section, with settings below it",
        fix,
    )


def _example(section: str) -> str:
    return next(key for key in field_table() if key.startswith(f"{section}."))


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a field accepts: {int, NoneType} for `PositiveInt | None`, {tuple} for a tuple."""
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(arg) for arg in get_args(annotation)))
    return {origin or annotation}


def _words(annotation: Any) -> tuple[Any, ...]:
    """The words that a Literal allows; none for another type."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _parse_words(value: Any, annotation: Any) -> Any:
    """The value of one word of a command line, or of the several words of a list."""
    if isinstance(value, list):
        plain = annotation is not None and str in _kinds(get_args(annotation)[0])
        return value if plain else [parse_scalar(word) for word in value]
    return _parse(value, annotation) if isinstance(value, str) else value


def _parse(text: str, annotation: Any) -> Any:
    """The value of command-line text: paths and names stay text, a comma list becomes a tuple."""
    kinds = _kinds(annotation) if annotation is not None else set()
    if tuple in kinds and not text.startswith("["):
        if text.startswith("{"):  # one source with settings of its own; several are written as a list
            return [parse_scalar(text)]
        items = [item.strip() for item in text.split(",") if item.strip()]
        return items if str in _kinds(get_args(annotation)[0]) else [parse_scalar(item) for item in items]
    if str in kinds:
        return None if type(None) in kinds and text in ("", "null", "none", "None", "~") else text
    return parse_scalar(text)


def _switch(setting: Setting, key: str, written: str, value: Any) -> Assignment:
    if value == "auto" and "auto" in _words(field_table()[key].annotation):
        return Assignment(key, value, setting.origin, written)
    if not isinstance(value, bool):
        raise ConfigError(
            f"{setting.origin}: {written} is {value!r}", "it is true or false", f"or set {key} itself"
        )
    when_true, when_false = SWITCHES[written.rpartition(".")[2]]
    return Assignment(key, when_true if value else when_false, setting.origin, written, weak=not value)


def _fit(setting: Setting, key: str, written: str, value: Any, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    # pydantic would read true as the number 1
    if isinstance(value, bool) and bool not in kinds:
        word = "true" if value else "false"
        raise ConfigError(
            f"{setting.origin}: {written} is {word}", "it is not a switch", "write a value of its kind"
        )
    # TOML has no null
    if type(None) in kinds and str not in kinds and value == "none":
        return None
    if tuple in kinds and isinstance(value, str):
        return (value,)
    if key == SOURCES:
        check_fields(value, key, setting.origin)
    return value
