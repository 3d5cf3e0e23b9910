"""What a meter keeps of a launch, and what memory a process has taken since a mark."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from trainway.training.speed import WARM_UP, Pace, SpeedMeter, device_name, gemm_flops

CPU = torch.device("cpu")


def test_the_pace_leaves_out_the_warm_up_and_what_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter = SpeedMeter(6.0, 0.0, CPU)
    assert meter.pace() is None
    for _ in range(WARM_UP):
        clock.now += 1000
        meter.step(1)
    assert meter.pace() is None
    for seconds, tokens in ((1, 10), (4, 20), (3, 60)):
        clock.now += 500  # an evaluation
        meter.restart()
        clock.now += seconds
        meter.step(tokens)
    assert meter.pace() == Pace(3, 3, 30)


def test_a_matrix_product_has_a_speed() -> None:
    assert 1e8 < gemm_flops(CPU, torch.float32) < 1e14
    assert device_name(CPU) == "cpu"


MEMORY = """
import torch
from trainway.training.speed import MemoryMark
cpu, mib = torch.device("cpu"), 1 << 20
old = torch.ones(48 * mib)  # 192 MiB
del old
hidden = MemoryMark.now(cpu)
new = torch.ones(16 * mib)
print(hidden.above() // mib)
clean = MemoryMark.now(cpu, forget_peak=True)
more = torch.ones(32 * mib)
print(clean.above() // mib)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_above_a_mark() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    hidden, clean = map(int, done.stdout.split())
    assert hidden == 0  # an older peak hides it: nothing is said rather than something wrong
    assert 126 <= clean <= 140
