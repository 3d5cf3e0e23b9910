"""What benchmarks of several arms share: each arm a process of its own, and the interval of their ratios."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from typing import Any


def run_process(script: str, *words: str, threads: int) -> dict[str, Any]:
    """Run `script WORDS` on so many threads; the JSON object in the last line that it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bootstrap_interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn anew from the ratios."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[9749]
