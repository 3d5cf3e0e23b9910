"""What a run needs on this machine, checked before any process starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trainway.config.mixes import train_sources
from trainway.config.rules import is_local
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.storage.address import is_remote
from trainway.tracking import refuse_missing_trackers

DATA_SUFFIXES = (".txt", ".text", ".md", ".py", ".jsonl", ".ndjson", ".json", ".gz", ".parquet", ".csv")


def check_requirements(config: RunConfig) -> None:
    """See that the libraries and files that `config` names are there.

    Raises:
        ConfigError: a file or directory of the configuration is missing.
        DataError: files of conversations are missing; all of them are named.
        EnvironmentFault: a library is not installed.
    """
    _check_libraries(config)
    _check_file("engine.ds_config", config.engine.ds_config)
    template = config.data.chat_template
    _check_file("data.chat_template", template if template and template.endswith(".jinja") else None)
    path = config.model.path
    if path is not None and is_local(path) and not Path(path).expanduser().is_dir():
        raise ConfigError(
            f"model.path is {path}",
            "there is no such directory",
            "give a directory in Hugging Face's format, or a Hub id such as Qwen/Qwen2.5-3B-Instruct",
        )
    if config.recipe in ("sft", "gad"):
        _check_conversations(config)


def _check_libraries(config: RunConfig) -> None:
    if config.engine.name in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentFault(
            f"engine.name is {config.engine.name}, and DeepSpeed is not installed",
            "",
            "pip install ninja && pip install --no-build-isolation 'deepspeed>=0.19.8'; or use engine.name=fsdp",
        )
    if config.lora.quantize == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "lora.quantize is 4bit, and bitsandbytes is not installed",
            "",
            "pip install 'trainway[qlora]', or leave lora.quantize at none",
        )
    refuse_missing_trackers(config.tracking)


def _check_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).expanduser().is_file():
        raise ConfigError(f"{key} is {path}", "there is no such file", "check the path")


def _check_conversations(config: RunConfig) -> None:
    sources = [(source.path, source.optional) for source in train_sources(config.data)]
    sources += [(path, False) for path in config.data.validation]
    missing = [path for path, optional in sources if not optional and _is_missing(path)]
    if missing:
        raise DataError(
            f"{'a data file is' if len(missing) == 1 else f'{len(missing)} data files are'} missing: "
            f"{', '.join(missing)}",
            f"looked for from {Path.cwd()}",
            "bring the files here, correct data.train, or mark one as optional: {path: FILE, optional: true}",
        )


def _is_missing(path: str) -> bool:
    """Whether `path` is written as one local file that is not there; patterns, Hub ids and addresses are not."""
    if is_remote(path) or any(sign in path for sign in "*?["):
        return False
    return (is_local(path) or path.endswith(DATA_SUFFIXES)) and not Path(path).expanduser().exists()
