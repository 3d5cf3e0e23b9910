"""Statistics of rows: shapes, sizes, the distribution of lengths, duplicates, the longest rows by their line."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainway.config.schema import DataConfig
from trainway.data.dedup import Deduplicator
from trainway.data.records import FieldNames, Kind, Record
from trainway.data.rows import BadRow
from trainway.data.validate import Progress, find_rows, read_all
from trainway.errors import DataError

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
LONGEST = 5
_BATCH = 256


@dataclass
class ShapeStats:
    """Of the rows of one shape."""

    rows: int = 0
    turns: int = 0
    characters: int = 0
    tokens: int = 0


@dataclass
class Stats:
    """Of all rows. `unit` is what lengths are counted in: characters, or tokens where a tokenizer was given."""

    files: int
    bytes: int
    unit: str
    rows: int = 0
    bad: int = 0
    duplicates: int = 0
    shapes: dict[str, ShapeStats] = field(default_factory=dict)
    roles: Counter[str] = field(default_factory=Counter)
    mean: float = 0.0
    quantiles: dict[str, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # from, to (included), rows
    longest: list[tuple[str, int, int]] = field(default_factory=list)  # file, line, length
    rendered: bool = False
    """Whether lengths are those of rows as fine-tuning sees them."""
    refused: Counter[str] = field(default_factory=Counter)  # by reason: rows that the chat template refuses
    max_length: int | None = None
    too_long: int = 0

    def total(self, name: str) -> int:
        return sum(getattr(shape, name) for shape in self.shapes.values())

    def as_dict(self) -> dict[str, Any]:
        sums = {name: self.total(name) for name in ("turns", "characters", "tokens")}
        if self.unit != "tokens":
            del sums["tokens"]
        shapes = {
            name: {key: value for key, value in vars(shape).items() if key == "rows" or key in sums}
            for name, shape in sorted(self.shapes.items())
        }
        result = {**vars(self), **sums, "shapes": shapes, "roles": dict(self.roles)}
        if not self.rendered:
            del result["refused"]
        if self.max_length is None:
            del result["max_length"], result["too_long"]
        del result["rendered"]
        return result


def measure(
    patterns: Sequence[str],
    *,
    config: DataConfig | None = None,
    names: FieldNames | None = None,
    kind: Kind = "auto",
    tokenizer: Path | None = None,
    max_length: int | None = None,
    dedup: bool = False,
    progress: Progress = lambda label, done, total: None,
) -> Stats:
    """Statistics of files, directories and patterns. Bad rows are counted and set aside.

    tokenizer: count tokens; with a chat template (config.chat_template or the tokenizer's own) those of the rendered
    row, else those of its texts without special tokens. Rows that the template refuses are counted by their reason,
    and in no other figure. max_length: count the rows with more tokens. dedup: leave duplicates out of all other
    figures. Memory: some 30 bytes per row. Raises DataError when there is no good row, ConfigError for a template that
    cannot be had.
    """
    config = config or DataConfig()
    paths = find_rows(patterns, config)
    unit = "tokens" if tokenizer else "characters"
    stats = Stats(len(paths), sum(path.stat().st_size for path in paths), unit, max_length=max_length)
    count_tokens = _token_counter(tokenizer, config, stats) if tokenizer else None
    lengths = _Lengths()
    seen = Deduplicator()
    batch: list[tuple[Record, str, int]] = []

    def flush() -> None:
        counts: Sequence[int | None]
        counts = count_tokens([record for record, _, _ in batch]) if count_tokens else [0] * len(batch)
        for (record, source, line), tokens in zip(batch, counts, strict=True):
            if tokens is None:
                continue
            stats.too_long += max_length is not None and tokens > max_length
            characters = _count(stats, record, tokens)
            lengths.add(tokens if count_tokens else characters, source, line)
        batch.clear()

    for located in read_all(paths, config, names, kind, progress=progress, label="counting"):
        if isinstance(located, BadRow):
            stats.bad += 1
            continue
        if not seen.is_new(located.record.content_key()) and dedup:
            continue
        batch.append((located.record, str(located.source), located.line))
        if len(batch) == _BATCH:
            flush()
    flush()
    if not stats.rows:
        if stats.refused:
            (reason, _), *_ = stats.refused.most_common(1)
            raise DataError("there is no row that the chat template takes", reason, "name another template")
        why = f"all {stats.bad:,} rows are malformed"
        raise DataError("there is no good row", why, f"trainway data validate {' '.join(patterns)}")
    stats.duplicates = seen.duplicates
    lengths.summarise(stats)
    return stats


def _count(stats: Stats, record: Record, tokens: int) -> int:
    """Add a record; returns its characters."""
    shape = stats.shapes.setdefault(record.shape, ShapeStats())
    turns = record.turns()
    characters = len(record.text) + sum(len(turn.content) for turn in turns)
    stats.rows += 1
    shape.rows += 1
    shape.turns += len(turns)
    shape.characters += characters
    shape.tokens += tokens
    stats.roles.update(turn.role for turn in turns)
    return characters


class _Lengths:
    """The length of every row, in 8 bytes each, and the longest rows."""

    def __init__(self) -> None:
        self._all = array("q")
        self._longest: list[tuple[int, int, str, int]] = []

    def add(self, length: int, source: str, line: int) -> None:
        self._all.append(length)
        # of equal ones the first
        entry = (length, -len(self._all), source, line)
        if len(self._longest) < LONGEST:
            heapq.heappush(self._longest, entry)
        elif entry > self._longest[0]:
            heapq.heapreplace(self._longest, entry)

    def summarise(self, stats: Stats) -> None:
        values = np.sort(np.frombuffer(self._all, dtype=np.int64))
        stats.mean = float(values.mean())
        # nearest rank: each is the length of a row that exists
        ranks = [max(0, int(np.ceil(share * len(values))) - 1) for share in QUANTILES]
        stats.quantiles = {
            f"{share:g}": int(values[rank]) for share, rank in zip(QUANTILES, ranks, strict=True)
        }
        stats.longest = [(source, line, length) for length, _, source, line in sorted(self._longest)[::-1]]
        stats.histogram = _histogram(values)


def _histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Rows by length, in doubling steps: 0, 1, 2 to 3, 4 to 7, ..., without the empty steps at both ends."""
    steps = [0, *(1 << power for power in range(int(values[-1]).bit_length() + 1))]
    counts = np.diff(np.searchsorted(values, steps, side="left"))
    found = np.nonzero(counts)[0]
    return [(steps[step], steps[step + 1] - 1, int(counts[step])) for step in range(found[0], found[-1] + 1)]


def _token_counter(
    path: Path, config: DataConfig, stats: Stats
) -> Callable[[Sequence[Record]], list[int | None]]:
    from trainway.data.chat import UNLIMITED, ChatEncoder, Refused
    from trainway.data.tokenizer import load_tokenizer, text_encoder

    tokenizer = load_tokenizer(path)
    # what is trained does not matter for lengths, and every token counts
    chat = ChatEncoder(tokenizer, config.model_copy(update={"train_on": "all"}), UNLIMITED)
    stats.rendered = chat.template is not None
    if chat.template is not None:

        def count_rendered(records: Sequence[Record]) -> list[int | None]:
            sizes: list[int | None] = []
            for result in chat(records):
                if isinstance(result, Refused):
                    stats.refused[result.why] += 1
                    sizes.append(None)
                else:
                    sizes.append(len(result.tokens))
            return sizes

        return count_rendered
    encoder = text_encoder(tokenizer)

    def count(records: Sequence[Record]) -> list[int | None]:
        texts = [[text for _, text in record.texts()] for record in records]
        flat = [text for row in texts for text in row]
        sizes = iter(encoder.encode_batch_fast(flat, add_special_tokens=False))
        return [sum(len(next(sizes)) for _ in row) for row in texts]

    return count
