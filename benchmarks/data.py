"""Measures the data layer: the loader's tokens per second, and preparation against the bare tokenizer.

python benchmarks/data.py
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from trainway.config.schema import DataConfig, RunConfig, SourceConfig, TokenizerConfig
from trainway.data.loader import Loader, Packing
from trainway.data.mix import plan_mix
from trainway.data.prepare import prepare
from trainway.data.store import TokenSplit
from trainway.data.tokenizer import load_tokenizer, text_encoder, train_tokenizer

DOCUMENT_CHARACTERS = 4096
REPEATS = 2  # of the corpus, so that fixed costs weigh as they do in a real one
ROUNDS = 3
PACKINGS: tuple[Packing, ...] = ("documents", "concat")


def main() -> None:
    torch.set_num_threads(1)
    for mean in (256, 512, 1024, 2048):
        for packing in PACKINGS:
            rate = loader_rate(mean, packing)
            print(
                f"loader, documents of {mean:4d} tokens, {packing:9s}: {rate / 1e6:6.1f} M tokens/s on one core"
            )
    for rows in (8, 256):
        one, mixed = (loader_rate(512, "documents", rows=rows, num_sources=n) for n in (1, 4))
        print(
            f"loader, steps of {rows:3d} rows, a mix of 4 sources: {mixed / 1e6:6.1f} M tokens/s on one core, "
            f"{mixed / one:.2f} of the rate without a mix"
        )
    with tempfile.TemporaryDirectory() as scratch:
        compare_preparation(Path(scratch))


def loader_rate(
    mean_tokens: int, packing: Packing, seq_len: int = 2048, rows: int = 8, num_sources: int = 1
) -> float:
    """Tokens per second of processor time, with random documents of geometric length in memory."""
    random = np.random.default_rng(0)
    streams = []
    for _ in range(num_sources):
        lengths = random.geometric(1 / mean_tokens, 50_000_000 // mean_tokens // num_sources)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        tokens = random.integers(0, 32000, int(starts[-1])).astype(np.uint16)
        streams.append(TokenSplit.from_arrays(tokens, starts, eos_id=1))
    sources = [SourceConfig(path=str(number), weight=number + 0.7) for number in range(num_sources)]
    mix = plan_mix(sources, [stream.num_tokens for stream in streams], seq_len)
    loader = Loader(
        streams,
        mix=mix if num_sources > 1 else None,
        seq_len=seq_len,
        global_batch_size=rows,
        micro_batch_size=rows,
        seed=0,
        packing=packing,
        shuffle=True,
    )
    loader.step(1)
    steps = max(20, 4000 // rows)
    began = time.process_time()
    for step in range(2, steps + 2):
        loader.step(step)
    return steps * rows * seq_len / (time.process_time() - began)


def compare_preparation(scratch: Path) -> None:
    texts = list(documents()) * REPEATS
    size = sum(len(text.encode()) for text in texts)
    tokenizer_dir = scratch / "tokenizer"
    train_tokenizer(texts[: len(texts) // REPEATS], TokenizerConfig(vocab_size=8192), tokenizer_dir)
    corpus = scratch / "corpus.jsonl"
    with corpus.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    encoder = text_encoder(load_tokenizer(tokenizer_dir))
    runs = iter(range(1_000_000))

    def bare() -> None:
        encoder.encode_batch_fast(texts, add_special_tokens=False)

    def whole() -> None:
        data = DataConfig(train=(str(corpus),), store_dir=str(scratch / f"cache-{next(runs)}"))
        prepare(RunConfig(data=data, tokenizer=TokenizerConfig(path=str(tokenizer_dir))))

    bare()
    ratios = []
    for _ in range(ROUNDS):
        a1, b1, b2, a2 = (seconds(run) for run in (bare, whole, whole, bare))
        ratios.append((a1 + a2) / (b1 + b2))
        bare_rate, whole_rate = 2 * size / (a1 + a2)[0] / 1e6, 2 * size / (b1 + b2)[0] / 1e6
        print(
            f"encode_batch_fast {bare_rate:.2f} MB/s, prepare {whole_rate:.2f} MB/s, "
            f"ratio {ratios[-1][0]:.3f} (of processor time {ratios[-1][1]:.3f})"
        )
    wall, processor = np.median(ratios, axis=0)
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB, {os.cpu_count()} cores")
    print(f"median ratio {wall:.3f} (of processor time {processor:.3f})")


def documents() -> Iterator[str]:
    """The standard library's source in pieces of some kilobytes."""
    for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
        folders[:] = sorted(set(folders) - {"test", "tests", "site-packages", "dist-packages", "__pycache__"})
        for name in sorted(names):
            if name.endswith(".py"):
                text = Path(folder, name).read_text(encoding="utf-8", errors="ignore").replace("\0", "")
                for start in range(0, len(text), DOCUMENT_CHARACTERS):
                    if (piece := text[start : start + DOCUMENT_CHARACTERS]).strip():
                        yield piece


def seconds(run: Callable[[], None]) -> np.ndarray:
    """Wall and processor seconds: on a machine shared with others only the second can be trusted."""
    began = np.array([time.perf_counter(), time.process_time()])
    run()
    return np.array([time.perf_counter(), time.process_time()]) - began


if __name__ == "__main__":
    main()
