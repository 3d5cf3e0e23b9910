"""The split language of Hugging Face datasets: `train`, `train[:1%]`, `train[100:200]`, `train[-5:]`, `train+test`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainway.errors import ConfigError

_NUMBER = r"-?\d+(?:\.\d+%|%)?"
_SLICE = re.compile(rf"([\w.-]+)(?:\[({_NUMBER})?:({_NUMBER})?\])?")


@dataclass(frozen=True)
class Bound:
    """One end of a slice: a row, counted from the end where negative, or a percentage of the rows."""

    value: float
    is_percent: bool = False

    @property
    def needs_count(self) -> bool:
        return self.is_percent or self.value < 0

    def row(self, count: int | None) -> int:
        """The row that the bound stands for; a percentage is rounded to the closest row."""
        value = self.value
        if self.needs_count:
            assert count is not None
            value = round(count * value / 100) if self.is_percent else value
            value = max(0, count + value) if value < 0 else value
        return int(value) if count is None else min(count, int(value))


@dataclass(frozen=True)
class SplitSlice:
    """Some consecutive rows of one split."""

    name: str
    start: Bound | None = None
    stop: Bound | None = None

    @property
    def needs_count(self) -> bool:
        """Whether the number of rows in the split must be known."""
        return any(bound is not None and bound.needs_count for bound in (self.start, self.stop))

    def rows(self, count: int | None) -> tuple[int, int | None]:
        """(first row, row after the last one; None: to the end). `count` is the number of rows, if it is known."""
        start = self.start.row(count) if self.start else 0
        stop = self.stop.row(count) if self.stop else None
        return start, stop if stop is None else max(start, stop)


def parse_split(text: str) -> list[SplitSlice]:
    """The slices of a split, in order, as in `train[:1%]+test[:10]`. Raises ConfigError for anything else."""
    slices = []
    for part in text.split("+"):
        match = _SLICE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"the split {text!r} is not understood",
                f"{part.strip()!r} is not NAME, NAME[FROM:TO], in rows or percent",
                "e.g. train, train[:1%], train[100:200], train[-5:], train[:1%]+test[:10]",
            )
        name, start, stop = match.groups()
        slices.append(SplitSlice(name, _bound(start, text), _bound(stop, text)))
    return slices


def _bound(text: str | None, split: str) -> Bound | None:
    if text is None:
        return None
    bound = Bound(float(text.removesuffix("%")) if "%" in text else int(text), text.endswith("%"))
    if bound.is_percent and abs(bound.value) > 100:
        raise ConfigError(f"the split {split!r} asks for {text} of the rows", fix="use at most 100%")
    return bound
