"""What is asked for with a release, and what it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainway.release.allowed import Left
from trainway.release.base_id import Base


@dataclass(frozen=True)
class Order:
    """What is to be released, and as what."""

    repo: str
    """OWNER/NAME."""
    tag: str
    which: str | int
    """best, latest, or a step."""
    merge: bool = False
    private: bool = True
    licence: str | None = None
    base: str | None = None
    """What the user says the base model is."""
    cost: float | None = None
    """Of the training, in dollars, for the card."""


@dataclass(frozen=True)
class File:
    """One file of a release."""

    path: str
    size: int
    """Bytes."""
    sha256: str
    git_oid: str
    """The name that Git gives to this content."""


@dataclass(frozen=True)
class Contents:
    """A release that lies ready."""

    directory: Path
    files: tuple[File, ...]
    left: tuple[Left, ...]
    """What the checkpoint holds and the release does not."""
    base: Base
