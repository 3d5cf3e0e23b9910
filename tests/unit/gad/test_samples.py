"""samples.jsonl of adversarial distillation: what is written comes back."""

from __future__ import annotations

import json
from pathlib import Path

from trainway.gad.samples import Sample, read_samples, write_samples
from trainway.tracking.jsonl import cut_after

SAMPLES = [
    Sample(0, "Say hi", "Hello!", "hhhh", -1.25, 0.1 + 0.2, True),
    Sample(0, "Grüß dich\n  zweimal", "Grüß Gott 👋", "", None, None, False),
    Sample(10, "Say hi", "Hello!", "Hi.", 0.5, 0.25, False),
]


def test_samples_come_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert list(read_samples(path)) == []
    write_samples(path, SAMPLES[:2])
    write_samples(path, SAMPLES[2:])
    assert list(read_samples(path)) == SAMPLES
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["step", "prompt", "teacher", "student", "score", "teacher_score", "truncated"]
    assert "Grüß Gott 👋" in path.read_text(encoding="utf-8")  # as a person reads it
    cut_after(path, 0)
    assert list(read_samples(path)) == SAMPLES[:2]


def test_other_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 5, "prompt": "def f", "text": "(x)"}\n[1]\n5\n')
    write_samples(path, SAMPLES[:1])
    with path.open("a") as file:
        file.write('{"step": 20, "prompt": "a')  # the process died here
    assert list(read_samples(path)) == SAMPLES[:1]
