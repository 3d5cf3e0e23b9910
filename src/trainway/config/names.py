"""Every name a setting may be called by: its dotted path, its bare name, and what other tools call it."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainway.config.mixes import check_fields
from trainway.config.schema import RunConfig
from trainway.config.source import Setting, parse_scalar
from trainway.errors import ConfigError

ALIASES: dict[str, str] = {
    "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.total_steps",
    "max_train_steps": "train.total_steps",
    "block_size": "train.seq_len",
    "max_seq_length": "train.seq_len",
    "max_length": "train.seq_len",
    "sequence_length": "train.seq_len",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "torch_compile": "train.compile",
    "learning_rate": "optim.lr",
    "adam_beta1": "optim.betas.0",
    "adam_beta2": "optim.betas.1",
    "adam_epsilon": "optim.eps",
    "lr_scheduler_type": "schedule.name",
    "logging_steps": "log.every",
    "log_level": "log.level",
    "save_steps": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "eval.every",
    "output_dir": "run_dir",
    "run_name": "name",
    "ddp_timeout": "engine.timeout_s",
    "nproc_per_node": "engine.nproc",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "dataset_text_field": "data.text_field",
    "tokenizer_name": "tokenizer.path",
    "model_type": "model.architecture",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "tie_word_embeddings": "model.tie_embeddings",
    "rms_norm_eps": "model.norm_eps",
    "max_position_embeddings": "model.max_seq_len",
    "initializer_range": "model.init_std",
}
"""Names of other tools. A bare field name that is unique (`total_steps`, `warmup_steps`) needs no entry here."""

SWITCHES: dict[str, tuple[str, str]] = {
    "bf16": ("bf16", "fp32"),
    "fp16": ("fp16", "fp32"),
    "gradient_checkpointing": ("full", "none"),
}
"""Aliases that are true or false elsewhere: the value for true, the value for false."""

VALUES: dict[str, dict[Any, Any]] = {
    "optim.name": dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"
    ),
    "schedule.name": {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"},
    "train.precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    "tracking.report_to": {"none": ()},
    "max_steps": {-1: None},
}
"""Other tools' values of a setting, by its path or by the alias that has them."""

SOURCES = "data.train"
"""The setting whose items may have fields of their own."""

OBSOLETE: dict[str, str] = {
    "evaluation_strategy": "it is obsolete: set eval.every, the steps between evaluations",
    "eval_strategy": "Trainway evaluates by steps: set eval.every",
    "save_strategy": "set checkpoint.save_every, and checkpoint.save_each_epoch for epochs",
    "logging_strategy": "Trainway logs by steps: set log.every",
    "warmup_ratio": "set schedule.warmup_steps, a number of steps",
    "use_cpu": "the device follows from the machine; hide GPUs with CUDA_VISIBLE_DEVICES=",
    "no_cuda": "the device follows from the machine; hide GPUs with CUDA_VISIBLE_DEVICES=",
    "hub_token": "a token does not belong into a configuration: set HF_TOKEN or run `hf auth login`",
}
"""Names that deserve an answer of their own."""


@dataclass(frozen=True)
class Assignment:
    """A value for one field. `key` is dotted; a last part that is a number is a place in a tuple."""

    key: str
    value: Any
    origin: str
    written: str
    weak: bool = False
    """`bf16: false` says fp32 only when nothing else in its layer sets the precision."""


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
    if written in _sections():
        if value is None or value == {}:
            return None
        if not isinstance(value, str) or f"{written}.name" not in field_table():
            raise _section_error(setting, written)
        key = f"{written}.name"
    else:
        key = _resolve(written, setting.origin)
    leaf = written.rpartition(".")[2]
    info = field_table().get(key)
    if textual and isinstance(value, str):
        value = _parse(value, info.annotation if info and leaf not in SWITCHES else None)
    if leaf in SWITCHES:
        return _switch(setting, key, written, value)
    for table in (VALUES.get(key, {}), VALUES.get(leaf, {})):
        # a comma list of one word is that word
        alone = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        if isinstance(alone, str | int) and alone in table:
            value = table[alone]
    if info is not None:
        value = _fit(setting, key, written, value, info.annotation)
    return Assignment(key, value, setting.origin, written)


def is_switch(name: str) -> bool:
    """Whether a setting is true or false, so that `--name` alone means true."""
    written = name.replace("-", "_")
    if written.rpartition(".")[2] in SWITCHES:
        return True
    try:
        key = _resolve(written, "")
    except ConfigError:
        return False
    return key in field_table() and bool in _kinds(field_table()[key].annotation)


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


def _resolve(written: str, origin: str) -> str:
    """The dotted path that `written` means."""
    table = field_table()
    if written in table:
        return written
    head, _, leaf = written.rpartition(".")
    if head in table and leaf.isdigit() and get_origin(table[head].annotation) is tuple:
        return written
    target = ALIASES.get(leaf)
    if target and (not head or target.startswith(f"{head}.")):
        return target
    where = f"{origin}: " if origin else ""
    if leaf in OBSOLETE:
        raise ConfigError(f"{where}{written} is not a setting", OBSOLETE[leaf], "replace it")
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
