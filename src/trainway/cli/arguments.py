"""What the words after a verb mean: which is the CONFIG, which are settings, which go to torchrun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from typer.core import TyperCommand

from trainway.errors import ConfigError

CONFIG_METAVAR = "CONFIG [KEY=VALUE]..."
CONFIG_HELP = "A preset's name or a .yaml or .toml file, then settings: optim.lr=1e-3, --seed 7."
OPEN_ENDED: dict[str, Any] = {"ignore_unknown_options": True}
"""Context settings of a verb that takes settings as options: `--seed 7` is not an unknown option there."""


class PassesOn(TyperCommand):
    """A verb whose words after `--` are for another program; they are found in `context.obj`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, rest = list(args), []
        if "--" in own:
            cut = own.index("--")
            own, rest = own[:cut], own[cut + 1 :]
        ctx.obj = rest
        return super().parse_args(ctx, own)


def split_arguments(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, list[str]]:
    """(CONFIG, settings). RUN_CONFIG stands in for a CONFIG that is not given. Raises ConfigError without either."""
    words = list(words)
    if words and not _is_setting(words[0]):
        return words[0], words[1:]
    if environ.get("RUN_CONFIG"):
        return environ["RUN_CONFIG"], words
    raise ConfigError(
        "there is no CONFIG",
        "it is the first word after the verb, a preset's name or a file, and RUN_CONFIG is not set either",
        "e.g. `trainway config check m3_medium`; `trainway presets` lists the presets",
    )


def parse_resume(text: str) -> Literal["auto", "never"] | int:
    """`auto`, `never` or a step. Raises ConfigError for anything else."""
    if text == "auto":
        return "auto"
    if text == "never":
        return "never"
    if re.fullmatch(r"[0-9]+", text):
        return int(text)
    raise ConfigError(
        f"--resume is {text!r}", "it is auto, never, or the number of a saved step", "e.g. --resume 500"
    )


def parse_count(text: str) -> Literal["auto"] | int:
    """A number of processes or `auto`. Raises ConfigError for anything else."""
    if text == "auto":
        return "auto"
    if re.fullmatch(r"[1-9][0-9]*", text):
        return int(text)
    raise ConfigError(f"--nproc is {text!r}", "it is auto or a number from 1", "e.g. --nproc 2")


def parse_which(text: str) -> Literal["best", "latest"] | int:
    """`best`, `latest` or a step. Raises ConfigError for anything else."""
    if text == "best":
        return "best"
    if text == "latest":
        return "latest"
    if re.fullmatch(r"[0-9]+", text):
        return int(text)
    raise ConfigError(
        f"--which is {text!r}", "it is best, latest, or a saved step", "`trainway checkpoints RUN` lists them"
    )


def parse_checkpoints(text: str) -> list[str | int]:
    """`best`, `latest`, `all` and steps, with commas between them. Raises ConfigError for anything else."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    return ["all" if word == "all" else parse_which(word) for word in words]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ConfigError when it cannot be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {path}", str(error), "give a UTF-8 text file, one prompt a line"
        ) from None


def _is_setting(word: str) -> bool:
    # a file may have an equals sign in its name
    return word.startswith("-") or ("=" in word and not Path(word).is_file())
