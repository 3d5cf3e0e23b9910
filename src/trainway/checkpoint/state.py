"""The training state: every number that must survive a restart and is neither a weight nor an optimiser tensor."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from trainway.errors import DataError

FORMAT = 1
STATE_FILE = "state.json"
"""Its name in a checkpoint."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimiser steps.

    Random state is not here on purpose: every random stream (order of rows, dropout, samples) is derived anew
    from (seed, step, rank) at each step, so the step alone restores it, on any number of ranks.
    """

    step: int
    """Optimiser steps done."""
    tokens_seen: int
    """Target tokens trained on, over all ranks."""
    samples_seen: int
    """Rows trained on, over all ranks."""
    best_val_loss: float | None
    """Lowest validation loss so far, in nats per token; None before the first evaluation."""
    best_step: int | None
    """Step of the lowest validation loss."""
    last_val_loss: float | None
    """Most recent validation loss, in nats per token."""
    skipped_steps: int
    """Steps left out by the loss and gradient guard, in all."""
    guard: dict[str, Any]
    """State of the guard (JSON)."""
    scaler: dict[str, Any]
    """State of the fp16 loss scaler (JSON); empty without one."""
    elapsed_s: float
    """Training seconds so far, over all launches of the run."""
    config_hash: str
    data_hash: str
    tokenizer_hash: str
    base_hash: str
    """Identity of the model that the run started from; empty for a new one."""

    def to_json(self) -> str:
        """The state as JSON text. Floats are written by repr, so they come back bit for bit."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "training state") -> TrainState:
        """Read what `to_json` wrote; `source` names the file in errors.

        Raises DataError for anything that is not a complete state: other JSON, unknown, missing or ill-typed fields.
        """
        fields = _parse(text, source)
        expected = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - expected):
            raise _refuse(source, f"unknown fields: {', '.join(unknown)}")
        if missing := sorted(expected - fields.keys()):
            raise _refuse(source, f"missing fields: {', '.join(missing)}")
        return cls(**{name: _typed(name, fields[name], source) for name in expected})


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refuse(source, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _refuse(source, "not a JSON object")
    if (version := value.pop("format", None)) != FORMAT:
        raise _refuse(source, f"format {version!r}; this version of Trainway reads format {FORMAT}")
    return value


_INTEGERS = {"step", "tokens_seen", "samples_seen", "best_step", "skipped_steps"}
_FLOATS = {"best_val_loss", "last_val_loss", "elapsed_s"}
_OBJECTS = {"guard", "scaler"}
_OPTIONAL = {"best_val_loss", "best_step", "last_val_loss"}


def _typed(name: str, value: Any, source: str) -> Any:
    if value is None and name in _OPTIONAL:
        return None
    if name in _INTEGERS:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    elif name in _FLOATS:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if good else value
    else:
        good = isinstance(value, dict if name in _OBJECTS else str)
    if not good:
        raise _refuse(source, f"field {name} has the wrong type or sign: {value!r:.80}")
    return value


def _refuse(source: str, why: str) -> DataError:
    return DataError(f"{source} cannot be read", why, "resume from another checkpoint")
