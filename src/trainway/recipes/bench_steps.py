"""The steps of a benchmark: which batches they take, when they are timed and profiled; and a save and its cost."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch
from torch.profiler import profile

from trainway.checkpoint.state import TrainState
from trainway.config.schema import RunConfig
from trainway.data.loader import Loader, StepBatch
from trainway.data.teacher_rows import TeacherBatch, TeacherLoader
from trainway.engines.world import World
from trainway.planning.forecast import Basis
from trainway.recipes.bench_result import Part, Spread
from trainway.recipes.model import RunModel
from trainway.training.saving import Saver
from trainway.training.speed import WARM_UP, MemoryMark, SpeedMeter, gemm_flops, peak_flops
from trainway.training.stopwatch import OTHER, StepTime, Stopwatch
from trainway.training.traffic import Traffic, measure_traffic, start_profile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("data", "rollout", "forward", "backward", "optimizer", OTHER)
"""In the order of a step."""
PROFILED_STEPS = 2
MEASURED_SAVE_BYTES = 8 << 30
"""A checkpoint that is larger is not written to learn how long it takes."""
PROBE_BYTES = 256 << 20
"""What is written instead."""


@dataclass(frozen=True)
class Bench:
    """What is asked for."""

    config: RunConfig
    """The run's own, with its evaluations and saves."""
    steps: int
    scratch: Path
    trace: Path | None
    warm_up: int = WARM_UP


@dataclass(frozen=True)
class Save:
    """What a checkpoint costs."""

    stall_s: float
    """For which training waits."""
    seconds: float
    """Until it is on the disk."""
    bytes: int
    basis: Basis


@dataclass(frozen=True)
class Found:
    """What the steps of a recipe have given."""

    built: RunModel
    ready: float
    """When the first step began, by time.time()."""
    parts: Sequence[Part]
    steps_s: float
    """Of all steps of the run."""
    ends: Sequence[int]
    """Last steps of its stages."""
    flops_per_token: float
    """0 where there is no one figure."""
    gemm_flops: float
    peak_bytes: int
    """Of this rank."""
    first_peak_bytes: int
    evaluation_s: float
    evaluation_basis: Basis
    save: Save


class Finished(Exception):
    """A loop that takes its rows one by one has had all of a benchmark's."""


@dataclass
class Course:
    """The course of a part's steps: warm-up, timed ones, and some under the profiler where that is wanted."""

    bench: Bench
    world: World
    mark: MemoryMark
    watch: Stopwatch
    targets: list[float] = field(default_factory=list)
    """Of this rank, by step."""
    first_peak_bytes: int = 0
    peak_bytes: int = 0
    traffic: Traffic | None = None
    _profile: profile | None = None

    @property
    def profiled(self) -> int:
        return PROFILED_STEPS if self.world.world_size > 1 or self.bench.trace is not None else 0

    @property
    def total(self) -> int:
        return self.bench.warm_up + self.bench.steps + self.profiled

    def begin(self, step: int) -> None:
        """Step `step`, counted from 1, begins; one more than there are only ends the last one."""
        timed = self.bench.warm_up + self.bench.steps
        if step == 2:
            self.first_peak_bytes = self.mark.above()
        if step == timed + 1:
            # the kernel counts pages in batches: a later reading of the same peak may be lower by some
            self.peak_bytes = max(self.mark.above(), self.first_peak_bytes)
        if step == timed + 1 and self.profiled:
            self.watch.begin_step()  # what the profiler takes to start is no step's
            self._profile = start_profile(self.world.device)
        if step == self.total + 1 and self._profile is not None:
            self._profile.stop()
            self.traffic = measure_traffic(self._profile, self.world.device, PROFILED_STEPS)
            self._write_trace(self._profile)
        self.watch.begin_step()

    def timed(self) -> list[StepTime]:
        return self.watch.steps()[self.bench.warm_up :][: self.bench.steps]

    def _write_trace(self, stopped: profile) -> None:
        if self.bench.trace is None or not self.world.is_main:
            return
        temp = self.bench.trace.with_name(f".{self.bench.trace.name}.tmp-{os.getpid()}.json")
        if self.bench.trace.name.endswith(".gz"):
            temp = temp.with_name(f"{temp.name}.gz")
        try:
            stopped.export_chrome_trace(str(temp))
            os.replace(temp, self.bench.trace)
        finally:
            temp.unlink(missing_ok=True)


class BenchBatches:
    """The batches of the supervised loop: the longest first, then those that a run takes."""

    def __init__(self, loader: Loader, course: Course) -> None:
        self._loader, self._course = loader, course

    def steps(self, start: int, stop: int, prefetch: int) -> Generator[StepBatch, None, None]:
        """Those of the benchmark, whatever `stop` says."""
        course, last = self._course, self._course.total
        with closing(self._loader.steps(1, last, prefetch)) as usual:
            for number in range(1, last + 1):
                course.begin(number)
                with course.watch.phase("data"):
                    batch = next(usual) if number > 1 else self._loader.longest(number)
                    batch = replace(batch, step=number)
                course.targets.append(batch.num_targets)
                yield batch
            course.begin(last + 1)


class BenchRows:
    """The rows of a stage of gad in the same order. Raises Finished behind the last ones."""

    def __init__(self, loader: TeacherLoader, course: Course) -> None:
        self._loader, self._course = loader, course

    def step(self, step: int) -> TeacherBatch:
        course = self._course
        course.begin(step)
        if step > course.total:
            raise Finished
        with course.watch.phase("data"):
            rows = self._loader.step(step - 1) if step > 1 else self._loader.longest(step)
        # every rank has all rows
        course.targets.append(sum(len(row.response) for row in rows.rows) / course.world.world_size)
        return rows


class StepMeter(SpeedMeter):
    """A meter that keeps what it is told of each step, and what `watched` holds at its end."""

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float,
        device: torch.device,
        watched: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__(flops_per_token, peak_flops, device)
        self.tokens: list[float] = []
        self.seconds_by_name: list[dict[str, float]] = []
        self._watched = watched

    def step(self, tokens: float) -> dict[str, float]:
        self.tokens.append(tokens)
        self.seconds_by_name.append(dict(self._watched))
        return super().step(tokens)


class NoSaver(Saver):
    """A saver that a loop may ask and that writes nothing: a benchmark that is stopped has nothing to keep."""

    @classmethod
    def like(cls, saver: Saver) -> NoSaver:
        return cls(**{part.name: getattr(saver, part.name) for part in fields(saver) if part.init})

    def save(self, state: TrainState) -> None:
        pass


class Peaks:
    """What the device gives at best, measured by all ranks at once."""

    def __init__(self, world: World, dtype: torch.dtype) -> None:
        world.barrier()
        own = gemm_flops(world.device, dtype)
        self.gemm = world.sum(own)[0] / world.world_size
        self.peak = peak_flops(world.device)[0] if world.device.type == "cuda" else self.gemm


def make_part(
    name: str, run_steps: int, course: Course, tokens: Sequence[float], flops_per_token: float, peaks: Peaks
) -> Part:
    """The figures of a part. `tokens`: of each step from the first one, over all ranks."""
    world, times, first = course.world, course.timed(), course.bench.warm_up
    seconds = [step.seconds for step in times]
    names = [name for name in PHASES if any(name in step.phases for step in times)]
    per_step = mean(tokens[first:][: len(times)])
    (learnt,) = world.sum(mean(course.targets[first:][: len(times)]))
    speed = per_step / mean(seconds)
    flops = speed * flops_per_token / world.world_size
    return Part(
        name=name,
        steps=len(times),
        run_steps=run_steps,
        step_s=Spread.of(seconds),
        phases={phase: mean(step.phases.get(phase, 0.0) for step in times) for phase in names},
        tokens_per_step=per_step,
        supervised_per_step=learnt,
        tokens_per_s=speed,
        supervised_tokens_per_s=learnt / mean(seconds),
        mfu=flops / peaks.peak if flops and peaks.peak else None,
        gemm_share=flops / peaks.gemm if flops else None,
        gad_s={},
        communication=course.traffic if world.world_size > 1 else None,
    )


def timed_together(world: World, action: Callable[[], Any]) -> float:
    """Seconds until the last rank is done with what all begin together."""
    world.barrier()
    started = time.perf_counter()
    action()
    world.barrier()
    return time.perf_counter() - started


def measure_save(saver: Saver, state: TrainState, scratch: Path, size: int) -> Save:
    """Write one checkpoint of about `size` bytes, or, where that is too much, so much less and compute the rest."""
    world = saver.world
    free = shutil.disk_usage(scratch).free
    (whole,) = world.sum(world.is_main and size <= min(MEASURED_SAVE_BYTES, free // 2))
    if not whole:
        seconds = size / world.from_main(_write_speed(scratch, free) if world.is_main else 0.0)
        return Save(seconds, seconds, size, "modelled")
    saver.stalled_s = 0.0
    total = timed_together(world, lambda: saver.save(state))
    stall = saver.stalled_s if saver.asynchronous else total
    total += timed_together(world, saver.finish)
    found = saver.store.resolve("latest") if world.is_main else None
    size = sum(path.stat().st_size for path in _files(found)) if found else 0
    return Save(stall, total, int(world.sum(size)[0]), "measured")


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _write_speed(scratch: Path, free: int) -> float:
    """Bytes per second that the run's file system takes and keeps."""
    size = max(1 << 20, min(PROBE_BYTES, free // 4))
    block, path = os.urandom(1 << 20), scratch / "probe"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return (size >> 20 << 20) / seconds
