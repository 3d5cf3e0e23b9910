"""What steps really took: one small file for each measurement, from which plans learn (no torch)."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from trainway.files import atomic_write
from trainway.logs import warn


@dataclass(frozen=True)
class Measurement:
    """The steps of one run or benchmark, on one kind of device."""

    date: str
    """ISO, UTC day."""
    source: Literal["bench", "run"]
    device: str
    """`NVIDIA H200`, or `cpu`."""
    world_size: int
    engine: str
    recipe: str
    family: str
    """Model family of `planning.shapes`, empty if unknown."""
    parameters: int
    trainable: int
    micro_batch_size: int
    seq_len: int
    checkpointing: str
    """train.activation_checkpointing."""
    attention: str
    precision: str
    """fp32, bf16, fp16."""
    flops_per_step: float
    """All ranks."""
    step_s: float
    """Median."""
    tokens_per_step: float
    peak_bytes: int
    """Highest of any rank, above the process's baseline on a CPU."""
    planned_bytes: int
    """What the plan said."""
    gemm_flops: float
    """Measured FLOP/s of a matrix product on this device, 0 if not measured."""


def measurements_dir() -> Path:
    """$TRAINWAY_HOME/measured, else ~/.cache/trainway/measured."""
    home = os.environ.get("TRAINWAY_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "trainway") / "measured"


def record(found: Measurement) -> Path:
    """Write one measurement to a file of its own. Raises EnvironmentFault or OSError when the disk does not take it."""
    directory = measurements_dir()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}.json"
    atomic_write(path, json.dumps(asdict(found), indent=2) + "\n")
    return path


def load_measurements(directory: Path | None = None) -> list[Measurement]:
    """Every measurement of a directory, oldest first; files that are none are passed over with a warning."""
    folder = directory or measurements_dir()
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name: values[field.name] for field in fields(Measurement)}
            found.append(Measurement(**known))
        except (OSError, ValueError, TypeError, KeyError) as error:
            warn(f"{path} is no measurement: {type(error).__name__}: {error}")
    return found
