"""What a benchmark has found, as values for scripts and as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, quantiles
from typing import Any

from trainway.planning.forecast import Forecast
from trainway.training.progress import clock
from trainway.training.traffic import Traffic

GIB = 2**30


@dataclass(frozen=True)
class Spread:
    """Seconds of steps: their median, quartiles, mean and extremes."""

    median: float
    quartiles: tuple[float, float]
    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(middle, (low, high), mean(values), min(values), max(values))


@dataclass(frozen=True)
class Part:
    """Steps of one kind: all of a run, or one stage of recipe gad."""

    name: str
    """train, or the stage."""
    steps: int
    """That were timed."""
    run_steps: int
    """Of the whole run."""
    step_s: Spread
    phases: Mapping[str, float]
    """Mean seconds of a step on rank 0 by phase; together they are step_s.mean. The optimiser's holds clipping."""
    tokens_per_step: float
    """Mean over all ranks, padding not counted."""
    supervised_per_step: float
    """Those of them that are learnt; gad: of the teacher's answers."""
    tokens_per_s: float
    supervised_tokens_per_s: float
    mfu: float | None
    """Share of the device's peak: a GPU's data sheet, the measured matrix product on a CPU; None where FLOPs or peak are
    not known."""
    gemm_share: float | None
    """Share of the matrix product measured just before."""
    gad_s: Mapping[str, float]
    """Recipe gad: mean seconds of rollout, score, discriminator and student, as its metrics have them; else empty."""
    communication: Traffic | None
    """Of a step under the profiler; None on one rank. It lies within the phases, mostly in the backward pass."""


@dataclass(frozen=True)
class Memory:
    """Bytes; on a CPU above what the process held before the model."""

    peak_bytes: int
    """Highest of any rank."""
    longest_batch_bytes: int
    """The same after the first step, whose batch is the longest."""
    ranks: tuple[int, ...]
    planned_bytes: int | None
    """What the plan says of one rank; None for a model whose shape it does not know."""


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark has found."""

    recipe: str
    device: str
    world_size: int
    engine: str
    precision: str
    parameters: int
    trainable: int
    warm_up_steps: int
    """That were left out of each part; the first one took the longest batch."""
    parts: tuple[Part, ...]
    flops_per_token: float | None
    """Forward and backward; None for gad."""
    gemm_flops: float
    """FLOP/s of a matrix product on one device, measured by all ranks at once."""
    memory: Memory
    forecast: Forecast
    trace: str | None
    measurement: str | None
    """The file that keeps it for later plans."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, what follows from them included."""
        forecast = self.forecast
        derived = {name: getattr(forecast, name) for name in ("training_s", "seconds", "hours", "dollars")}
        return {**asdict(self), "forecast": {**asdict(forecast), **derived}}

    def __str__(self) -> str:
        ranks = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        lines = [f"{self.recipe} by {self.engine} on {ranks}, {self.device}, {self.precision}"]
        for part in self.parts:
            lines += _part_lines(part, several=len(self.parts) > 1)
        lines += [_memory_line(self.memory), *_forecast_lines(self.forecast)]
        for name in ("trace", "measurement"):
            if (path := getattr(self, name)) is not None:
                lines.append(f"{name:<14}{path}")
        return "\n".join(lines)


def _part_lines(part: Part, *, several: bool) -> list[str]:
    spread = part.step_s
    low, high = spread.quartiles
    name = f"{part.name}: " if several else ""
    lines = [
        f"{'step':<14}{name}{spread.median:.4g} s, quartiles {low:.4g} to {high:.4g}, {part.steps} steps",
        f"{'speed':<14}{part.tokens_per_s:,.0f} tokens/s, {part.supervised_tokens_per_s:,.0f} of them learnt",
    ]
    if part.gemm_share is not None:
        mfu = "" if part.mfu is None else f"MFU {part.mfu:.1%}, "
        lines.append(f"{'arithmetic':<14}{mfu}{part.gemm_share:.1%} of a matrix product on this device")
    shares = sorted(part.phases.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{phase} {seconds / spread.mean:.1%}" for phase, seconds in shares)
    lines.append(f"{'phases':<14}{shown}")
    if part.gad_s:
        own = ", ".join(f"{what} {seconds:.4g} s" for what, seconds in part.gad_s.items())
        lines.append(f"{'gad':<14}{own}")
    if (traffic := part.communication) is not None:
        lines.append(
            f"{'communication':<14}{traffic.busy_s:.4g} s of a profiled step, {traffic.exposed_s:.4g} s of it "
            "while nothing is computed; it lies within the phases"
        )
    return lines


def _memory_line(memory: Memory) -> str:
    planned = "" if memory.planned_bytes is None else f"; the plan: {_size(memory.planned_bytes)}"
    ranks = ""
    if len(memory.ranks) > 1:
        ranks = f" (ranks {', '.join(map(_size, memory.ranks))})"
    return f"{'memory':<14}peak {_size(memory.peak_bytes)} a rank{ranks}{planned}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def _forecast_lines(forecast: Forecast) -> list[str]:
    price = "" if forecast.dollars is None else f", {forecast.dollars:,.2f} USD"
    parts = f"{forecast.steps:,} steps {clock(forecast.steps_s)} (measured)"
    evaluations = forecast.evaluations * forecast.evaluation_s
    parts += f", {forecast.evaluations:,} evaluations {clock(evaluations)} ({forecast.evaluation_basis})"
    saves = forecast.training_s - forecast.steps_s - evaluations
    parts += f", {forecast.saves:,} saves {clock(saves)} ({forecast.save_basis})"
    return [
        f"{'forecast':<14}{forecast.hours:.2f} h{price}",
        f"{'':<14}{parts}, start {clock(forecast.start_s)}",
    ]
