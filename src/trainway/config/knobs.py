"""The environment knobs of a boot: which experiment, which preset, where the volume is, whether to shard."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainway.errors import ConfigError

Mode = Literal["local", "cloud"]

DEFAULTS: dict[Mode, dict[str, str]] = {
    "cloud": {"RUN_EXPERIMENT": "runpod-1b", "RUN_CONFIG": "runpod_1b", "TRAINWAY_ROOT": "/workspace"},
    "local": {"RUN_EXPERIMENT": "m3-medium", "RUN_CONFIG": "m3_medium", "TRAINWAY_ROOT": "."},
}
SHARD_LINES = 250_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Knobs:
    """What a boot is told by flags, environment and defaults together."""

    mode: Mode
    experiment: str
    config: str
    """A preset's name or a file."""
    root: str
    run_shard: bool | None
    """RUN_SHARD; None when it is not set."""
    shard_lines: int


def read_knobs(
    mode: str,
    environ: Mapping[str, str] = os.environ,
    *,
    experiment: str | None = None,
    config: str | None = None,
    root: str | None = None,
    shard_lines: int | None = None,
) -> Knobs:
    """RUN_EXPERIMENT, RUN_CONFIG, TRAINWAY_ROOT, RUN_SHARD and SHARD_LINES; a flag that is given wins.

    Raises ConfigError for a value that is none, naming where it came from.
    """
    if mode not in ("local", "cloud"):
        raise ConfigError(f"--mode is {mode!r}", "it is local or cloud", "e.g. --mode cloud")
    defaults = DEFAULTS[mode]  # type: ignore[index]

    def value(flag: str | None, name: str) -> str:
        return flag or environ.get(name) or defaults[name]

    chosen = value(experiment, "RUN_EXPERIMENT")
    if not _NAME.fullmatch(chosen):
        raise ConfigError(
            f"{'--experiment' if experiment else 'RUN_EXPERIMENT'} is {chosen!r}",
            "it names directories: letters, digits, dots, dashes and underscores, at most 128",
            "e.g. --experiment runpod-1b",
        )
    return Knobs(
        mode=mode,  # type: ignore[arg-type]
        experiment=chosen,
        config=value(config, "RUN_CONFIG"),
        root=value(root, "TRAINWAY_ROOT"),
        run_shard=_switch("RUN_SHARD", environ.get("RUN_SHARD", "")),
        shard_lines=_lines(shard_lines, environ.get("SHARD_LINES", "")),
    )


def _switch(name: str, text: str) -> bool | None:
    if text not in ("", "0", "1"):
        raise ConfigError(f"environment {name} is {text!r}", "it is 0 or 1", "correct it, or unset it")
    return None if text == "" else text == "1"


def _lines(flag: int | None, text: str) -> int:
    if flag is not None:
        name, number = "--train-shard-lines", str(flag)
    else:
        name, number = "environment SHARD_LINES", text.replace("_", "") or str(SHARD_LINES)
    if not re.fullmatch(r"[0-9]{1,12}", number) or int(number) < 1:
        raise ConfigError(f"{name} is {number!r}", "it is a number of lines, from 1", "e.g. 250000")
    return int(number)
