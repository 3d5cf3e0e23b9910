"""The plan's memory against real runs: some cases of the benchmark, which measures them in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("4M, many tokens", "4M, full", "4M sft lora", "20M, one micro-batch", "20M ddp")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of a process from /proc")
def test_the_plan_is_within_a_tenth_of_the_peak() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--case", *CASES],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(CASES)
    for name, planned, measured, _ in rows:
        assert float(planned) == pytest.approx(float(measured), rel=0.1), name
