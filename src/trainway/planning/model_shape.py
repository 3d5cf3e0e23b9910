"""The shape of the model that a plan is for, also of one that only the Hub knows: its config.json, never its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.planning.geometry import planned_shape
from trainway.planning.shapes import FAMILIES, ModelShape, read_shape

CONFIG = "config.json"
TIMEOUT_S = 10.0
MADE_BY = {"quickstart-out/model": "quickstart"}
"""Directories that a preset starts from, and the preset that makes them."""


def find_shape(config: RunConfig, vocab_size: int | None = None) -> ModelShape:
    """The shape of the run's model: a new one's, a directory's, a config.json's, a published one's, else the Hub's.

    `vocab_size`: rows of a new model's embedding, if the configuration leaves them open.

    Raises:
        ConfigError: the vocabulary is not known before its tokenizer is read; a family whose shape is not known.
        DataError: a config.json is malformed, or there is none.
        EnvironmentFault: the Hub cannot be asked.
    """
    path = config.model.path
    if path is not None and Path(path).expanduser().is_file():
        return _read(Path(path).expanduser(), path)
    if (shape := planned_shape(config, vocab_size)) is not None:
        return shape
    if path is None:
        raise ConfigError(
            "the size of the vocabulary is not known",
            f"it is that of {config.tokenizer.path}, which a plan does not read",
            "set model.vocab_size to the number of its tokens",
        )
    folder = Path(path).expanduser()
    if path in MADE_BY and not folder.exists():
        from trainway.config.load import load_config

        return find_shape(load_config(MADE_BY[path], environ={}).config)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise DataError(
                f"{path} has no {CONFIG}", "a plan needs the model's shape", "name a model's directory"
            )
        return _read(folder / CONFIG, path)
    if path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise DataError(
            f"there is no model at {path}",
            "it is no file, no directory, and no id of the Hub",
            "correct model.path",
        )
    return _parse(_fetch(path, config.model.revision), path)


def _read(path: Path, name: str) -> ModelShape:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(name, error) from None
    return _parse(content, name)


def _parse(content: Any, name: str) -> ModelShape:
    try:
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
        shape = read_shape(content)
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(name, error) from None
    if shape is None:
        raise ConfigError(
            f"{name}: the shape of the family {content.get('model_type')!r} is not known",
            f"known are {', '.join(sorted([*FAMILIES, 'gpt2']))}",
            "measure it with a short run instead",
        )
    return shape


def _refused(name: str, error: Exception) -> DataError:
    return DataError(
        f"cannot read the {CONFIG} of {name}",
        f"{type(error).__name__}: {error}",
        "name a model's directory, or its config.json",
    )


def _fetch(name: str, revision: str | None) -> Any:
    """What config.json says, from the Hub's cache, else from the Hub; one request, and nothing is kept."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session

    found = try_to_load_from_cache(name, CONFIG, revision=revision)
    if isinstance(found, str):
        return json.loads(Path(found).read_text(encoding="utf-8"))
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
        answer = get_session().get(
            hf_hub_url(name, CONFIG, revision=revision),
            headers=build_hf_headers(),
            timeout=TIMEOUT_S,
            follow_redirects=True,
        )
        answer.raise_for_status()
        return answer.json()
    except Exception as error:  # of many kinds: offline, no such model, gated, no network
        why = " ".join(str(error).split())
        raise EnvironmentFault(
            f"the shape of {name} is not known here, and the Hub does not give its {CONFIG}",
            f"{type(error).__name__}: {why[:200]}",
            f"set model.path to a {CONFIG} of your own, or HF_TOKEN for a gated model",
        ) from None
