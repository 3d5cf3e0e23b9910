"""metrics.jsonl as whole steps, while it is being written."""

from __future__ import annotations

import json
from pathlib import Path

from trainway.tracking.tail import Tail, last_step
from trainway.tracking.target import Row


def write(path: Path, *records: dict[str, object]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_step_is_whole_when_a_later_one_follows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows(10) == [] and tail.last() == []
    write(path, {"step": 1, "train/loss": 2.0, "perf/step_s": 0.5, "samples": "ab", "ok": True})
    assert tail.rows(10) == []
    write(path, {"step": 1, "val/loss": 3.0})
    assert tail.rows(10) == []
    write(path, {"step": 2, "train/loss": 1.0, "perf/step_s": 0.25})
    first = Row(1, 0.5, {"train/loss": 2.0, "perf/step_s": 0.5, "val/loss": 3.0})
    assert tail.rows(10) == [first]
    assert tail.last() == [Row(2, 0.75, {"train/loss": 1.0, "perf/step_s": 0.25})]
    assert last_step(path) == 2


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    text = json.dumps({"step": 1, "x": 0.1 + 0.2}) + "\n"
    for part in (text[:7], text[7:12], text[12:]):
        with path.open("a") as file:
            file.write(part)
        assert tail.rows(10) == []
    assert tail.last() == [Row(1, 0.0, {"x": 0.1 + 0.2})]
    with path.open("a") as file:
        file.write("torn\n[1]\n" + json.dumps({"step": 2, "x": 1}) + "\n" + json.dumps({"step": 3}) + "\n")
    assert [row.step for row in tail.rows(1)] == [1]
    assert [row.step for row in tail.rows(1)] == [2]


def test_no_file_has_no_last_step(tmp_path: Path) -> None:
    assert last_step(tmp_path / "metrics.jsonl") == -1
