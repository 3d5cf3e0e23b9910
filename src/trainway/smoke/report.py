"""What the smoke test is told, and what it says: settings, checks, the verdict. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainway.errors import ConfigError, ExitCode

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class SmokeSettings:
    """The model and its data: small, so that what takes time is the cluster."""

    epochs: int = 2
    batch_size: int = 256
    """Rows of one step, over all ranks."""
    samples: int = 4096
    features: int = 128
    classes: int = 4
    lr: float = 3e-3
    seed: int = 42
    timeout_s: float = 60.0
    """A step of the test that takes longer is a failure, of the rank that it waits for."""
    min_bandwidth: float = 0.0
    """Least bus bandwidth of the largest all-reduce, in GB/s; 0 asks for none."""

    def check(self, world_size: int) -> None:
        """Raises ConfigError for settings under which nothing could be learnt."""
        for name in ("epochs", "batch_size", "samples", "features", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.removesuffix('_s').replace('_', '-')} must be above 0")
        if self.classes < 2:
            raise ConfigError("--classes must be 2 or more", "there is nothing to tell apart")
        if self.seed < 0 or self.lr < 0 or self.min_bandwidth < 0:
            raise ConfigError("--seed, --lr and --min-bandwidth must not be negative")
        if not world_size <= self.batch_size <= self.samples:
            raise ConfigError(
                f"a batch of {self.batch_size} rows does not do for {world_size} ranks and {self.samples} samples",
                "each rank takes a row of it at least, and it is taken from the samples",
                f"set --batch-size between {world_size} and {self.samples}",
            )

    def arguments(self) -> list[str]:
        """The same settings as words of the command line, for the ranks."""
        words = []
        for name, value in asdict(self).items():
            words += [f"--{name.removesuffix('_s').replace('_', '-')}", f"{value}"]
        return words


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    text: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:<5} {self.name:<15} {self.text}"


def passed(checks: Sequence[Check]) -> bool:
    return all(check.status != "FAIL" for check in checks)


def exit_code(checks: Sequence[Check]) -> int:
    return ExitCode.DONE if passed(checks) else ExitCode.ENVIRONMENT


def verdict(checks: Sequence[Check]) -> str:
    """The last line."""
    return "PASS" if passed(checks) else "FAIL"


def as_json(settings: SmokeSettings, checks: Sequence[Check]) -> str:
    found = {
        "verdict": verdict(checks),
        "settings": asdict(settings),
        "checks": [
            {"name": check.name, "status": check.status.lower(), "text": check.text, **check.figures}
            for check in checks
        ],
    }
    return json.dumps(found, indent=2)


def odd_ones(values: Sequence[Any]) -> list[int]:
    """The places whose value is not that of most; of values that are equally frequent the first one counts as right."""
    right = max(values, key=values.count)
    return [place for place, value in enumerate(values) if value != right]


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 1 (node-0)`, `ranks 1 (node-0), 3 (node-1)`."""
    listed = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
