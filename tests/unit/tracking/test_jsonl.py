"""metrics.jsonl: whole lines at once, cut back exactly, a torn last line left out."""

from __future__ import annotations

from pathlib import Path

from trainway.tracking.jsonl import JsonlTracker, cut_after, read_jsonl


def test_cut_keeps_the_exact_floats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    values = [0.1 + 0.2, 1 / 3, 2.0**-1074, 1e308]
    for step, value in enumerate(values, 1):
        tracker.log(step, {"train/loss": value})
    tracker.close()
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 5, "train/lo')  # the process died here
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3, 4]
    cut_after(path, 3)
    assert path.read_text() == "".join(before[:3])
    assert [r["train/loss"] for r in read_jsonl(path)] == values[:3]


def test_a_line_is_on_the_disk_before_the_tracker_is_closed(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"train/loss": 1.5})
    assert [r["train/loss"] for r in read_jsonl(tmp_path / "m.jsonl")] == [1.5]
    tracker.close()
