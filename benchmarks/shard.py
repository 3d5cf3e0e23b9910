"""Speed and memory of the sharder over a generated stream, against a plain line writer in the same run.

    python benchmarks/shard.py [--gigabytes 2] [--rounds 3]

MB are of text before compression; per second of processor time, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainway.config.schema import ShardConfig
from trainway.data.shard_input import open_input
from trainway.data.shard_manifest import Commit
from trainway.data.shard_pour import Sink, pour, restore
from trainway.data.shard_writer import Written
from trainway.data.sources import Document

WORDS = "the a def class return import self value name data list of to in is not and for with from".split()
DOCUMENT_WORDS = 560
DISTINCT = 4000
HERE = Path("generated")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    logging.disable()  # a line a shard
    texts = documents()
    size = sum(len(text) for text in texts)
    print(f"{len(texts)} distinct documents of {size / len(texts):,.0f} bytes, repeated")
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch), texts, size, given.rounds)
        read_and_shard(Path(scratch), texts, size)
        constant_memory(Path(scratch), texts, given.gigabytes)


class Generated:
    """A stream of `count` documents; resuming it is not needed here."""

    name = "generated"

    def __init__(self, texts: list[str], count: int) -> None:
        self._texts, self._count = texts, count

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def position(self) -> dict[str, Any]:
        return {}

    def done(self) -> tuple[int, int]:
        return 0, 0

    def __iter__(self) -> Iterator[Document]:
        texts, distinct = self._texts, len(self._texts)
        for number in range(self._count):
            yield Document(texts[number % distinct], HERE, number)


def compare(scratch: Path, texts: list[str], size: int, rounds: int) -> None:
    """Each style against a plain loop that writes a line a document, interleaved."""
    repeats = 8
    arms: dict[str, Callable[[], None]] = {
        "plain text": lambda: plain(scratch / "plain.txt", texts, repeats, as_json=False),
        "shards text": lambda: shards(scratch, texts, repeats),
        "plain jsonl": lambda: plain(scratch / "plain.jsonl", texts, repeats, as_json=True),
        "shards jsonl": lambda: shards(scratch, texts, repeats, format="jsonl"),
        "shards split": lambda: shards(scratch, texts, repeats, mode="split", val_ratio=0.01),
        "plain gzip-1": lambda: plain_gzip(scratch / "plain.txt.gz", texts, repeats),
        "shards gzip-1": lambda: shards(scratch, texts, repeats, gzip=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            rates[name].append(size * repeats / 1e6 / seconds(arm))
    for name, found in rates.items():
        print(f"{name:14s} {statistics.median(found):7.1f} MB/s per core   {[round(rate) for rate in found]}")
    for style in ("text", "jsonl", "gzip-1"):
        ratios = [a / b for a, b in zip(rates[f"shards {style}"], rates[f"plain {style}"], strict=True)]
        print(f"{style}: shards / plain {statistics.median(ratios):.2f}")


def read_and_shard(scratch: Path, texts: list[str], size: int) -> None:
    """The whole way from a JSONL file, parsing included."""
    source = scratch / "source.jsonl"
    repeats = 8
    with source.open("w", encoding="utf-8") as file:
        for _ in range(repeats):
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    settings = ShardConfig(inputs=(str(source),), out="unused")
    took = seconds(lambda: shards(scratch, [], 0, stream=open_input(settings, Path(), None)))
    print(f"from JSONL     {size * repeats / 1e6 / took:7.1f} MB/s per core, reading and checking included")


def constant_memory(scratch: Path, texts: list[str], gigabytes: float) -> None:
    size = sum(len(text) for text in texts)
    repeats = max(1, round(gigabytes * 1e9 / size))
    shards(scratch, texts, 1)
    before = peak_mb()
    took = seconds(lambda: shards(scratch, texts, repeats))
    rate = size * repeats / 1e6 / took
    print(f"{size * repeats / 1e9:.2f} GB of text: {rate:.1f} MB/s per core; ", end="")
    print(f"peak memory {before:.1f} MB before, {peak_mb():.1f} MB after")


def shards(scratch: Path, texts: list[str], repeats: int, *, stream: Any = None, **settings: Any) -> None:
    out = scratch / "out"
    val_out = scratch / "val" if settings.get("mode") == "split" else None
    for folder in (out, scratch / "val"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    config = ShardConfig(inputs=("generated",), out=str(out), lines_per_shard=10_000, **settings)
    commit = Commit(Written(), Written() if val_out else None, None, None, complete=False)
    sink = Sink(config, out, val_out, {}, commit)
    restore(sink)
    pour(stream or Generated(texts, repeats * len(texts)), sink, lambda: False, lambda *_: None)


def plain(path: Path, texts: list[str], repeats: int, *, as_json: bool) -> None:
    with path.open("w", encoding="utf-8") as file:
        for _ in range(repeats):
            for text in texts:
                line = json.dumps({"text": text}, ensure_ascii=False) if as_json else text.replace("\n", " ")
                file.write(line + "\n")


def plain_gzip(path: Path, texts: list[str], repeats: int) -> None:
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        for _ in range(repeats):
            for text in texts:
                file.write(text.replace("\n", " ") + "\n")


def documents() -> list[str]:
    """Texts of about 3 KB of ASCII with some line breaks."""
    rng = random.Random(0)
    return [
        " ".join(rng.choice(WORDS) + rng.choice(["", "s", "\n", f"_{rng.randrange(99)}"]) for _ in range(DOCUMENT_WORDS))
        for _ in range(DISTINCT)
    ]  # fmt: skip


def seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
