"""Ten thousand steps: memory, open files and disk stay flat."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psutil
import pytest

from tests.conftest import metrics, tiny, write_config


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_grows(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = tiny(corpus, store_dir, tmp_path / "run", total_steps=10_000, seq_len=16, global_batch_size=2)
    config["checkpoint"] = {"save_every": 500, "keep_last": 2}
    config["eval"] = {"every": 500, "max_tokens": 512, "num_samples": 1, "max_new_tokens": 4}
    command = [sys.executable, "-m", "trainway", "train", str(write_config(tmp_path / "c.yaml", config))]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    watched = psutil.Process(process.pid)
    samples: dict[int, tuple[int, int, int]] = {}  # by step: resident bytes, open files, threads
    path = tmp_path / "run/metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.5)
        if path.exists():
            step = path.read_bytes().count(b'"samples"')
            try:
                samples[step] = (watched.memory_info().rss, watched.num_fds(), watched.num_threads())
            except psutil.NoSuchProcess:
                break
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert len(metrics(tmp_path / "run")) == 10_000
    early = [value for step, value in samples.items() if 2000 <= step < 4000]
    late = [value for step, value in samples.items() if step >= 8000]
    assert median(rss for rss, _, _ in late) <= 1.02 * median(rss for rss, _, _ in early)
    assert max(fds for _, fds, _ in late) <= max(fds for _, fds, _ in early)
    assert max(threads for _, _, threads in late) <= max(threads for _, _, threads in early)
    kept = [entry for entry in (tmp_path / "run/checkpoints").iterdir() if not entry.is_symlink()]
    assert len(kept) <= 3  # the newest two and the best
