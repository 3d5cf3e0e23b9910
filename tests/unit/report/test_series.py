"""Series of metrics.jsonl: what they hold, how they follow a file that grows, shrinks or is torn, and what they cost."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trainway.report.series import LONGEST_LINE, RunSeries


def write(path: Path, *records: dict[str, Any], mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def losses(first: int, last: int, loss: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": loss + step} for step in range(first, last + 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_short_run_is_kept_step_by_step(path: Path) -> None:
    write(path, {"step": 0, "val/loss": 3.0}, *losses(1, 4), {"step": 4, "val/loss": 2.0})
    series = RunSeries(path)
    assert series.update()
    train, val = series.columns()["train/loss"], series.columns()["val/loss"]
    assert (train.steps, train.mean, train.width) == ([1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0], 1)
    assert train.low == train.mean == train.high
    assert (val.steps, val.mean) == ([0, 4], [3.0, 2.0])
    assert series.last == {"val/loss": (4, 2.0), "train/loss": (4, 5.0)}
    assert train.to_json() == {"steps": [1, 2, 3, 4], "mean": [2.0, 3.0, 4.0, 5.0]}


def test_too_many_steps_halve_the_points_and_keep_what_was_lowest_and_highest(path: Path) -> None:
    write(path, *losses(0, 99, loss=0.0))
    series = RunSeries(path, most_points=30)
    series.update()
    found = series.columns()["train/loss"]
    assert found.width == 4 and len(found.steps) == 25
    assert found.steps[:2] == [2, 6] and found.steps[-1] == 98
    assert (found.low[0], found.mean[0], found.high[0]) == (0.0, 1.5, 3.0)
    assert (found.low[-1], found.mean[-1], found.high[-1]) == (96.0, 97.5, 99.0)
    assert sum(found.mean) * 4 == sum(range(100))
    assert found.to_json()["low"][:2] == [0.0, 4.0]


def test_sparse_metrics_keep_their_exact_steps_beside_dense_ones(path: Path) -> None:
    for step in range(0, 5001, 500):
        write(path, {"step": step, "val/loss": float(step)}, *losses(step + 1, step + 500))
    series = RunSeries(path, most_points=100)
    series.update()
    found = series.columns()
    assert found["val/loss"].steps == list(range(0, 5001, 500)) and found["val/loss"].width == 1
    assert found["train/loss"].width == 64


def test_steps_far_apart_are_still_bounded(path: Path) -> None:
    write(path, *({"step": 10**k, "x": 1.0} for k in range(15)))
    series = RunSeries(path, most_points=4)
    series.update()
    found = series.columns()["x"]
    assert len(found.steps) <= 4 and found.steps == sorted(found.steps)


def test_one_step_recorded_twice_is_one_point(path: Path) -> None:
    write(path, {"step": 1, "x": 1.0}, {"step": 2, "x": 5.0}, {"step": 1, "x": 3.0})
    series = RunSeries(path)
    series.update()
    found = series.columns()["x"]
    assert (found.steps, found.low, found.mean, found.high) == ([1, 2], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0])
    assert series.last["x"] == (1, 3.0)


def test_reading_on_equals_reading_at_once(path: Path) -> None:
    following = RunSeries(path, most_points=16)
    assert not following.update()  # not there yet
    for first in range(1, 200, 7):
        write(path, *losses(first, first + 6))
        assert following.update()
        assert not following.update()
    whole = RunSeries(path, most_points=16)
    whole.update()
    assert following.columns() == whole.columns()
    assert following.last == whole.last


def test_a_torn_last_line_waits_for_its_end(path: Path) -> None:
    write(path, *losses(1, 2))
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    series = RunSeries(path)
    assert series.update() and series.columns()["train/loss"].steps == [1, 2]
    with path.open("a") as file:
        file.write('ss": 9.0')
    assert not series.update()
    with path.open("a") as file:
        file.write("}\n")
    assert series.update() and series.last["train/loss"] == (3, 9.0)
    assert series.columns()["train/loss"].steps == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 9])
def test_a_resume_drops_the_records_of_another_future(path: Path, size: int) -> None:
    write(path, *losses(1, 10))
    series = RunSeries(path)
    series.update()
    # cut after step 4, then written on: shorter than before, and longer
    new = path.with_name("new")
    write(new, *losses(1, 4), *losses(5, 4 + size, loss=100.0))
    os.replace(new, path)
    assert series.update()
    assert series.columns()["train/loss"].mean == [*range(2, 6), *range(105, 105 + size)]
    assert series.last["train/loss"] == (4 + size, 104.0 + size)


def test_a_file_that_goes_takes_its_series_along(path: Path) -> None:
    write(path, *losses(1, 3))
    series = RunSeries(path)
    series.update()
    path.unlink()
    assert series.update() and series.columns() == {} and series.last == {}
    assert not series.update()
    write(path, *losses(1, 1))
    assert series.update() and series.columns()["train/loss"].steps == [1]


def test_a_file_emptied_in_place_begins_anew(path: Path) -> None:
    write(path, *losses(1, 3))
    series = RunSeries(path)
    series.update()
    write(path, *losses(7, 8), mode="w")
    assert series.update() and series.columns()["train/loss"].steps == [7, 8]


def test_what_is_not_finite_is_a_gap_and_counted(path: Path) -> None:
    nan, inf = math.nan, math.inf
    write(path, *({"step": k, "x": v} for k, v in enumerate([1.0, nan, inf, -inf, 2.0, 10**400])))
    series = RunSeries(path)
    series.update()
    found = series.columns()["x"]
    assert found.to_json() == {"steps": list(range(6)), "mean": [1.0, None, None, None, 2.0, None]}
    assert series.not_finite == {"x": 4}
    assert series.last["x"] == (5, inf)
    wide = RunSeries(path, most_points=2)  # NaN does not swallow the values beside it
    wide.update()
    assert wide.columns()["x"].mean == [1.0, 2.0]


def test_what_is_no_record_is_passed_over(path: Path) -> None:
    path.write_bytes(
        b'\xff\xfe\n[1]\n"text"\n{}\n{"step": "1", "x": 1}\n{"step": true, "x": 1}\n{"step": -1, "x": 1}\n'
        b'{"step": 1e400, "x": 1}\n\n{"step": 2, "x": true, "y": "1", "z": null, "samples": "aa"}\n'
        + b"[" * 100_000
        + b'\n{"step": 3, "x": 5}\r\n'
    )
    series = RunSeries(path)
    assert series.update()
    assert series.last == {"x": (3, 5.0)} and list(series.columns()) == ["x"]


def test_a_line_without_end_is_not_kept_in_memory(path: Path) -> None:
    write(path, *losses(1, 1))
    with path.open("ab") as file:
        for _ in range(10):
            file.write(b"x" * LONGEST_LINE)
        file.write(b"\n")
    write(path, *losses(2, 2))
    series = RunSeries(path)
    tracemalloc.start()
    series.update()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert series.columns()["train/loss"].steps == [1, 2]
    assert peak < 6 * LONGEST_LINE


@pytest.mark.slow
def test_a_run_of_400_000_steps_takes_no_more_memory_than_a_short_one(path: Path) -> None:
    names = ("train/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "perf/mfu")
    with path.open("w") as file:
        for step in range(1, 400_001):
            file.write(json.dumps({"step": step, **dict.fromkeys(names, step / 7)}) + "\n")
    series = RunSeries(path)
    tracemalloc.start()
    series.update()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = series.columns()
    assert all(1000 <= len(columns.steps) <= 2000 for columns in found.values())
    assert found["train/loss"].high[-1] == 400_000 / 7
    # 2,000 points of seven 8-byte columns each, and two blocks of the file
    assert kept < 1 << 20 and peak < 16 << 20, (kept, peak)
