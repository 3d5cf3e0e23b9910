"""The order of a benchmark's batches, and what is done about a checkpoint too large to be written for a look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.config.test_load import load
from trainway.data.loader import StepBatch
from trainway.engines.world import World
from trainway.errors import ConfigError
from trainway.recipes import bench_steps
from trainway.recipes.bench import _scratch, bench
from trainway.recipes.bench_result import Spread
from trainway.recipes.bench_steps import (
    Bench,
    BenchBatches,
    BenchRows,
    Course,
    Finished,
    NoSaver,
    StepMeter,
    measure_save,
)
from trainway.training.stopwatch import Stopwatch

CPU = torch.device("cpu")
WORLD = World(0, 0, 1, 1, CPU)


class _Mark:
    """A peak that grows by one with each look."""

    def __init__(self) -> None:
        self.looks = 0

    def above(self) -> int:
        self.looks += 1
        return self.looks


def course(steps: int, tmp_path: Path) -> Course:
    mark: Any = _Mark()
    return Course(Bench(load("m3_medium"), steps, tmp_path, None), WORLD, mark, Stopwatch(CPU))


class _Loader:
    """Batches whose hash says where they are from."""

    closed = False

    def longest(self, step: int) -> StepBatch:
        return StepBatch(step, (), 99, 99, "longest")

    def steps(self, start: int, stop: int, prefetch: int) -> Iterator[StepBatch]:
        try:
            for step in range(start, stop):
                yield StepBatch(step, (), step, step, f"run {step}")
        finally:
            self.closed = True


def test_the_longest_batch_comes_first_then_the_runs_own(tmp_path: Path) -> None:
    loader: Any = _Loader()
    own = course(2, tmp_path)
    batches = list(BenchBatches(loader, own).steps(1, 10**9, 4))
    assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]
    assert [batch.sample_hash for batch in batches] == ["longest", "run 1", "run 2", "run 3", "run 4"]
    assert own.targets == [99, 1, 2, 3, 4]
    assert loader.closed
    assert (own.first_peak_bytes, own.peak_bytes) == (1, 2)  # behind the first step, and behind the last
    assert len(own.timed()) == 2 and len(own.watch.steps()) == 5


def test_rows_of_a_stage_end_the_loop_that_asks_for_them(tmp_path: Path) -> None:
    asked: list[Any] = []
    row = SimpleNamespace(response=[1, 2, 3])
    loader: Any = SimpleNamespace(
        step=lambda step: asked.append(step) or SimpleNamespace(rows=[row]),
        longest=lambda step: asked.append("longest") or SimpleNamespace(rows=[row, row]),
    )
    own = course(1, tmp_path)
    rows = BenchRows(loader, own)
    for step in range(1, own.total + 1):
        rows.step(step)
    with pytest.raises(Finished):
        rows.step(own.total + 1)
    assert asked == ["longest", 1, 2, 3]
    assert own.targets == [6, 3, 3, 3]


class _Saver:
    world, asynchronous, stalled_s = WORLD, False, 0.0

    def save(self, state: object) -> None:
        raise AssertionError("this checkpoint is too large")


def test_a_large_checkpoint_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_steps, "_write_speed", lambda scratch, free: 2e9)
    saver, state = _Saver(), object()
    found = measure_save(saver, state, tmp_path, 40 << 30)  # type: ignore[arg-type]
    assert (found.basis, found.bytes) == ("modelled", 40 << 30)
    assert found.seconds == found.stall_s == (40 << 30) / 2e9


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    assert bench_steps._write_speed(tmp_path, free=8 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_saver_that_saves_nothing_is_like_the_other() -> None:
    from trainway.training.saving import Saver

    store: Any = "a store"
    real = Saver(WORLD, {}, store, {}, asynchronous=True, saved=lambda state: None)
    mute = NoSaver.like(real)
    state: Any = None
    mute.save(state)
    assert (mute.store, mute.asynchronous, mute.progress()) == ("a store", True, (False, False))


def test_a_meter_keeps_every_step() -> None:
    watched = {"student": 1.0}
    meter = StepMeter(0.0, 0.0, CPU, watched)
    meter.step(10)
    watched["student"] = 2.0
    meter.step(20)
    assert meter.tokens == [10, 20]
    assert meter.seconds_by_name == [{"student": 1.0}, {"student": 2.0}]


def test_a_spread() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 10.0]) == Spread(3.0, (2.0, 4.0), 4.0, 1.0, 10.0)
    assert Spread.of([2.0]) == Spread(2.0, (2.0, 2.0), 2.0, 2.0, 2.0)


def test_scratch_lies_where_the_run_would_and_goes_when_it_fails(tmp_path: Path) -> None:
    for words in ([f"run_dir={tmp_path}/runs/mine"], [f"runs_dir={tmp_path}/not/yet/there"]):
        with pytest.raises(RuntimeError), _scratch(load("m3_medium", words)) as scratch:
            assert scratch.parent == tmp_path
            (scratch / "file").touch()
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []


def test_the_python_function_refuses_what_the_command_line_does(tmp_path: Path) -> None:
    for how in ({"steps": 0}, {"gpu_price": float("nan")}, {"trace": tmp_path / "trace.html"}):
        with pytest.raises(ConfigError):
            bench(load("m3_medium"), **how)  # type: ignore[arg-type]
