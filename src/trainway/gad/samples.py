"""samples.jsonl of adversarial distillation: what the student answered at each validation, beside the teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from trainway.tracking.jsonl import read_jsonl


@dataclass(frozen=True)
class Sample:
    """One prompt of the validation split, answered after `step`."""

    step: int
    prompt: str
    """As a person reads it."""
    teacher: str
    """What the teacher answered."""
    student: str
    score: float | None
    """The discriminator's, of the student's answer; None where there is no discriminator."""
    teacher_score: float | None
    truncated: bool
    """The student was cut off before it came to an end."""


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Append the samples of a validation, one JSON line each."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a run in the order they were written; none where there is no file.

    Records of another form, such as another recipe's continued prompts and a line that a crash cut off, are left out.
    """
    names = [field.name for field in fields(Sample)]
    for record in read_jsonl(path):
        if isinstance(record, dict) and all(name in record for name in names):
            yield Sample(**{name: record[name] for name in names})
