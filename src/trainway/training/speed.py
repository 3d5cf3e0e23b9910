"""Tokens per second, MFU, memory: what the hardware gives, measured while it works."""

from __future__ import annotations

import resource
import time
from collections import deque
from pathlib import Path

import torch

from trainway.planning.arithmetic import peak_flops as data_sheet_flops
from trainway.training.gpu import watch_gpu
from trainway.training.pace import Pace


class SpeedMeter:
    """Times optimiser steps over a short window, so that one slow step does not hide the usual speed."""

    def __init__(
        self, flops_per_token: float, peak_flops: float, device: torch.device, pace: Pace | None = None
    ) -> None:
        """`pace`: told of every step, to warn of slow ones."""
        self._pace, self._gpu = pace, watch_gpu(device)
        self._flops, self._peak, self._device = flops_per_token, peak_flops, device
        self._seconds: deque[float] = deque(maxlen=20)
        self._tokens: deque[float] = deque(maxlen=20)
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Leave out what happened since the last step (an evaluation, a save)."""
        self._last = time.perf_counter()

    def step(self, tokens: float) -> dict[str, float]:
        """The figures after a step of so many tokens, padding not counted, over all ranks."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._tokens.append(tokens)
        self._last = now
        tokens_per_s = sum(self._tokens) / sum(self._seconds)
        metrics = {"perf/step_s": self._seconds[-1], "perf/tokens_per_s": tokens_per_s}
        if self._peak:
            metrics["perf/mfu"] = tokens_per_s * self._flops / self._peak
        metrics["perf/memory_gib"] = peak_memory_gib(self._device)
        utilization = self._gpu.share() if self._gpu is not None else None
        if utilization is not None:
            metrics["perf/gpu_utilization"] = utilization
        if self._pace is not None:
            self._pace.step(tokens / self._seconds[-1], utilization)
        return metrics

    def forget(self) -> None:
        """What follows is other work: its speed says nothing about what was before."""
        if self._pace is not None:
            self._pace.forget()

    @property
    def seconds_per_step(self) -> float:
        return sum(self._seconds) / len(self._seconds)


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage's peak would begin with that of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The device's peak in FLOP/s and where the figure is from: a GPU's data sheet (dense bf16), or for a CPU the
    best of five 1536³ fp32 matrix products measured now. 0 when the GPU is not in the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        flops = data_sheet_flops(name)
        return (
            (flops, f"{name} data sheet, dense bf16")
            if flops
            else (0.0, f"{name} is not in the table of peaks")
        )
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    times = []
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1536**3 / min(times[1:]), "measured fp32 matrix product"
