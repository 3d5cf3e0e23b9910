"""What runs and benchmarks have measured, one JSON file each, and which of it is nearest to a run that is planned."""

from __future__ import annotations

import json
import logging
import math
import os
import typing
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trainway.files import atomic_write
from trainway.planning.gpus import Gpu, gpu_of_device
from trainway.planning.shapes import is_mixture

log = logging.getLogger(__name__)

HOME_VARIABLE = "TRAINWAY_HOME"
FURTHEST = math.log(8)
"""A model of more than 8 times the parameters, or less than an eighth, says too little about another."""


@dataclass(frozen=True)
class Measurement:
    """One measured training step, and what was planned for it."""

    date: str
    """ISO, UTC day."""
    source: Literal["bench", "run"]
    device: str
    """As the driver calls it ("NVIDIA H200"), or "cpu"."""
    world_size: int
    engine: str
    recipe: str
    family: str
    """Model family of planning.shapes; empty if unknown."""
    parameters: int
    trainable: int
    micro_batch_size: int
    seq_len: int
    checkpointing: str
    """train.activation_checkpointing."""
    attention: str
    precision: str
    """fp32, bf16 or fp16."""
    flops_per_step: float
    """Of all ranks; 0 where they are not counted, as in gad: such a measurement tells of memory alone."""
    step_s: float
    """Median."""
    tokens_per_step: float
    peak_bytes: int
    """Highest of any rank; above the process's baseline on a CPU."""
    planned_bytes: int
    """What the plan said: `MemoryEstimate.total`, without any allowance."""
    gemm_flops: float
    """Measured FLOP/s of a matrix product on this device; 0 if not measured."""

    @property
    def is_adapted(self) -> bool:
        return self.trainable < self.parameters

    def mfu(self, gpu: Gpu) -> float:
        """Share of the peak: of the data sheet's, on a CPU of the measured matrix product; 0 where neither is known."""
        peak = gpu.peak_flops(self.precision) or self.gemm_flops
        return self.flops_per_step / (self.step_s * self.world_size * peak) if peak else 0.0

    def __str__(self) -> str:
        size = f"{self.parameters / 1e9:.2f}B" if self.parameters >= 1e9 else f"{self.parameters / 1e6:.0f}M"
        what = f"{self.recipe}{' with adapters' if self.is_adapted else ''} of {size}"
        return f"{self.source} of {self.date}: {what}, {self.world_size} x {self.device}, {self.engine}"


@dataclass(frozen=True)
class Work:
    """What is compared to find the measurement nearest to a run."""

    recipe: str
    family: str
    parameters: int
    is_adapted: bool
    is_mixture: bool
    """Of experts."""
    precision: str
    checkpointing: str
    seq_len: int
    micro_batch_size: int
    world_size: int


def state_dir() -> Path:
    """Where Trainway keeps what it learns on this machine: $TRAINWAY_HOME, else ~/.cache/trainway."""
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).expanduser() if home else Path.home() / ".cache" / "trainway"


def measurements_dir() -> Path:
    """$TRAINWAY_HOME/measured, else ~/.cache/trainway/measured."""
    return state_dir() / "measured"


def record(found: Measurement, directory: Path | None = None) -> Path:
    """Write a measurement into a file of its own, atomically; the file. Raises EnvironmentFault of the disk."""
    directory = directory or measurements_dir()
    directory.mkdir(parents=True, exist_ok=True)
    device = "".join(letter if letter.isalnum() else "-" for letter in found.device.lower())
    path = directory / f"{found.date}-{device}-{found.recipe}-{uuid.uuid4().hex[:8]}.json"
    atomic_write(path, json.dumps(asdict(found), indent=2) + "\n")
    return path


def load_measurements(directory: Path | None = None) -> list[Measurement]:
    """All measurements of a directory, the oldest file name first; a bad file is passed over with a warning."""
    found = []
    for path in sorted((directory or measurements_dir()).glob("*.json")):
        try:
            found.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s is passed over: %s", path, error)
    return found


def nearest(measurements: Iterable[Measurement], gpu: Gpu, work: Work) -> Measurement | None:
    """The measurement that says most about `work` on `gpu`; None where none is of the same device and kind.

    Same device, arithmetic, kind of recipe (gad or not), adapters or none, mixture or dense. Of those the one whose
    size, row, micro-batch and ranks are nearest by their ratios; checkpointing and family count a little; the newer
    one on a tie.
    """
    scored = [
        (distance, found)
        for found in measurements
        if gpu_of_device(found.device) == _bare(gpu) and (distance := _distance(found, work)) is not None
    ]
    if not scored:
        return None
    newest_first = sorted(scored, key=lambda pair: pair[1].date, reverse=True)
    return min(newest_first, key=lambda pair: pair[0])[1]


def _bare(gpu: Gpu) -> Gpu | None:
    return gpu_of_device(gpu.name)


def _distance(found: Measurement, work: Work) -> float | None:
    same = (
        (found.recipe == "gad") == (work.recipe == "gad")
        and found.precision == work.precision
        and found.is_adapted == work.is_adapted
        and is_mixture(found.family) == work.is_mixture
    )
    size = _ratio(found.parameters, work.parameters)
    if not same or size > FURTHEST:
        return None
    return (
        size
        + 0.5 * _ratio(found.seq_len, work.seq_len)
        + 0.25 * _ratio(found.micro_batch_size, work.micro_batch_size)
        + 0.25 * _ratio(found.world_size, work.world_size)
        + 0.5 * (found.checkpointing != work.checkpointing)
        + 0.25 * (found.family != work.family)
    )


def _ratio(one: int, other: int) -> float:
    return abs(math.log(one / other))


def _parse(content: Any) -> Measurement:
    """Raises TypeError or ValueError, which say what is wrong."""
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    kinds = typing.get_type_hints(Measurement)
    for field in fields(Measurement):
        if field.name not in content:
            raise TypeError(f"{field.name} is missing")
        value, kind = content[field.name], kinds[field.name]
        wanted: tuple[type, ...] = {int: (int,), float: (int, float)}.get(kind, (str,))
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise TypeError(f"{field.name} is {value!r}")
    found = Measurement(**{field.name: content[field.name] for field in fields(Measurement)})
    sizes = (found.world_size, found.parameters, found.micro_batch_size, found.seq_len)
    if min(sizes) < 1 or not (found.step_s > 0 and math.isfinite(found.step_s)) or found.flops_per_step < 0:
        raise ValueError("its sizes and seconds must be above 0, its FLOPs not below")
    return found
