"""The Hub id of the model that a run started from: as the run knows it, never a local path (R61)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainway.config.rules import is_local
from trainway.config.schema import ModelName, RunConfig
from trainway.errors import ConfigError

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)(?:--(?P<name>[^/]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME: TypeAdapter[str] = TypeAdapter(ModelName)


@dataclass(frozen=True)
class Base:
    """What a run started from."""

    id: str | None
    """On the Hub."""
    commit: str | None = None
    reason: str = ""
    """Why there is no id."""


def find_base_id(config: RunConfig, provenance: Mapping[str, Any], stated: str | None = None) -> Base:
    """What the card may call the base model.

    provenance: of the run, whose `base_model` tells a model of the Hub (it has a commit) from a local directory.
    stated: what the user says it is.

    Raises:
        ConfigError: what the user says is no id of the Hub, or contradicts the run.
    """
    known = _of_the_run(config, provenance)
    if stated is None:
        return known
    if not is_model_name(stated):
        raise ConfigError(
            f"{stated!r} is no id of a model on the Hub",
            "the card names the base model by it, and a local path says nothing to others",
            "write OWNER/NAME, or leave it out",
        )
    if config.model.path is None:
        raise ConfigError(
            f"release.base is {stated}, and the run started from no model",
            "it was trained from scratch",
            "leave it out",
        )
    if known.id is not None and known.id != stated:
        raise ConfigError(
            f"release.base is {stated}, and the run started from {known.id}",
            "the card would name another model than the one that was trained",
            "leave it out",
        )
    return Base(stated, known.commit)


def is_model_name(text: str) -> bool:
    """Whether a text is an id of the Hub by its form: OWNER/NAME, or the NAME of one of the oldest models."""
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return "--" not in text and not text.endswith(".git")


def _of_the_run(config: RunConfig, provenance: Mapping[str, Any]) -> Base:
    path = config.model.path
    if path is None:
        return Base(None, reason="the model was trained from scratch")
    origin = provenance.get("base_model") or {}
    commit = origin.get("commit")
    if commit and is_model_name(path):
        return Base(path, str(commit))
    if cached := _in_cache(Path(path)):
        return cached
    if origin or is_local(path) or Path(path).expanduser().exists():
        why = "model.path is a local directory, and nothing in it says which model of the Hub it is"
        return Base(None, reason=f"{why}; release.base names it")
    if not is_model_name(path):
        return Base(None, reason="model.path is no id of the Hub")
    return Base(path, config.model.revision if _COMMIT.fullmatch(config.model.revision or "") else None)


def _in_cache(path: Path) -> Base | None:
    """What a directory of the Hub's cache is: models--OWNER--NAME/snapshots/COMMIT."""
    parts = path.expanduser().parts
    for at, part in enumerate(parts[:-2]):
        match = _CACHED.fullmatch(part)
        if match and parts[at + 1] == "snapshots" and at + 3 == len(parts):
            name = "/".join(text for text in match.groups() if text)
            commit = parts[at + 2] if _COMMIT.fullmatch(parts[at + 2]) else None
            return Base(name, commit) if is_model_name(name) else None
    return None
