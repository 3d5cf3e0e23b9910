"""Measures the validation of rows: MB/s of one core, against bare json.loads on the same lines, and peak memory.

python benchmarks/validate.py
"""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainway.data.convert import convert
from trainway.data.dedup import Deduplicator
from trainway.data.validate import validate

ROWS = 60_000
ROUNDS = 3
WORDS = 'the quick brown fox jumps over a lazy dog größe 你好 😀 "quoted" new\nline {x} [y] \\path'.split(" ")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clean, mixed = folder / "clean.jsonl", folder / "mixed.jsonl"
        write(clean, bad_every=0)
        write(mixed, bad_every=50)
        for path in (clean, mixed):
            measure(f"json.loads alone, {path.stem}", path, lambda path=path: parse(path))
            measure(f"validate, {path.stem}", path, lambda path=path: validate([str(path)]))
        measure("validate --dedup, clean", clean, lambda: validate([str(clean)], dedup=True))
        for name in ("a.parquet", "a.csv"):
            out = folder / name
            measure(f"convert, jsonl to {name}", clean, lambda out=out: convert(str(clean), out, force=True))
            measure(f"validate, {name}", out, lambda out=out: validate([str(out)]))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    duplicates()


def write(path: Path, bad_every: int) -> None:
    choose = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            question, answer = (" ".join(choose.choices(WORDS, k=k)) for k in (choose.randint(5, 60), 150))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row = (
                {"messages": turns, "id": number},
                {"prompt": question, "completion": answer},
                {"text": answer, "score": 0.5, "meta": {"a": [1, 2]}},
            )[number % 3]
            line = json.dumps(row, ensure_ascii=number % 4 == 0)
            file.write((line[:-1] if bad_every and number % bad_every == 0 else line) + "\n")


def parse(path: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            try:
                json.loads(line)
            except ValueError:
                continue


def measure(name: str, path: Path, work: Callable[[], object]) -> None:
    size = path.stat().st_size / 1e6
    best_wall = best_cpu = float("inf")
    for _ in range(ROUNDS):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    print(
        f"{name:32s} {size:6.1f} MB  {size / best_cpu:6.1f} MB/s of processor time, {size / best_wall:6.1f} of wall time"
    )


def duplicates(count: int = 1_000_000) -> None:
    seen = Deduplicator()
    began = time.process_time()
    for number in range(count):
        seen.is_new(number.to_bytes(8, "little"))
    seconds = time.process_time() - began
    print(
        f"deduplicator: {count / seconds / 1e6:.2f} M rows/s, {seen.num_bytes / count:.1f} bytes per row at {count:,} rows"
    )


if __name__ == "__main__":
    main()
