"""Tokens per second, MFU, memory: what the hardware gives, measured while it works."""

from __future__ import annotations

import resource
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from trainway.planning.arithmetic import peak_flops as data_sheet_flops
from trainway.training.gpu import watch_gpu
from trainway.training.pace import PaceWatch

WARM_UP = 3
"""Steps at the beginning of a launch that say nothing of the others: memory is fetched, kernels are chosen."""
GEMM_S = 0.2
"""Seconds of products, for a start that does not wait for its own measure; a GPU makes its five in less."""
MOST_STEPS = 1000
"""How many steps' times are kept for the measure of a whole run."""


@dataclass(frozen=True)
class Pace:
    """How fast the latest steps were, the first ones of a launch left out."""

    steps: int
    step_s: float
    """Median."""
    tokens_per_step: float
    """Mean, padding not counted, over all ranks."""


class SpeedMeter:
    """Times optimiser steps over a short window, so that one slow step does not hide the usual speed."""

    def __init__(
        self, flops_per_token: float, peak_flops: float, device: torch.device, watch: PaceWatch | None = None
    ) -> None:
        """`watch`: told of every step, to warn of slow ones."""
        self._watch, self._gpu = watch, watch_gpu(device)
        self.flops_per_token, self._peak, self._device = flops_per_token, peak_flops, device
        self._seconds: deque[float] = deque(maxlen=20)
        self._tokens: deque[float] = deque(maxlen=20)
        self._history: deque[tuple[float, float]] = deque(maxlen=MOST_STEPS)
        self._taken = 0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Leave out what happened since the last step (an evaluation, a save)."""
        self._last = time.perf_counter()

    def step(self, tokens: float) -> dict[str, float]:
        """The figures after a step of so many tokens, padding not counted, over all ranks."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._tokens.append(tokens)
        self._taken += 1
        if self._taken > WARM_UP:
            self._history.append((self._seconds[-1], tokens))
        self._last = now
        tokens_per_s = sum(self._tokens) / sum(self._seconds)
        metrics = {"perf/step_s": self._seconds[-1], "perf/tokens_per_s": tokens_per_s}
        if self._peak:
            metrics["perf/mfu"] = tokens_per_s * self.flops_per_token / self._peak
        metrics["perf/memory_gib"] = peak_memory_gib(self._device)
        utilization = self._gpu.share() if self._gpu is not None else None
        if utilization is not None:
            metrics["perf/gpu_utilization"] = utilization
        if self._watch is not None:
            self._watch.step(tokens / self._seconds[-1], utilization)
        return metrics

    def forget(self) -> None:
        """What follows is other work: its speed says nothing about what was before."""
        if self._watch is not None:
            self._watch.forget()

    @property
    def seconds_per_step(self) -> float:
        return sum(self._seconds) / len(self._seconds)

    def pace(self) -> Pace | None:
        """Of this launch's latest steps; None while it has warmed up only."""
        if not self._history:
            return None
        seconds, tokens = zip(*self._history, strict=True)
        return Pace(len(seconds), median(seconds), mean(tokens))


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _resident("VmHWM") / 2**30


@dataclass(frozen=True)
class MemoryMark:
    """What a process held before its model was there: `above` says what has come on top."""

    device: torch.device
    resident: int
    """Bytes of the process on a CPU; 0 on a GPU, whose allocator counts what is ours alone."""
    peak: int
    """Highest so far."""

    @classmethod
    def now(cls, device: torch.device, *, forget_peak: bool = False) -> MemoryMark:
        """`forget_peak`: what the process once held does not count any more, if the system can forget it."""
        if device.type == "cuda":
            if forget_peak:
                torch.cuda.reset_peak_memory_stats(device)
            return cls(device, 0, 0)
        if forget_peak:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return cls(device, _resident("VmRSS"), _resident("VmHWM"))

    def above(self) -> int:
        """Bytes by which the peak of this process lies above the mark; 0 when a peak from before the mark hides it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return peak - self.resident if peak > self.peak else 0


def _resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far; both the latter where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage's peak would begin with that of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) << 10  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The device's peak in FLOP/s and where the figure is from: a GPU's data sheet (dense bf16), or for a CPU the
    best of some 1536³ fp32 matrix products measured now. 0 when the GPU is not in the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        flops = data_sheet_flops(name)
        return (
            (flops, f"{name} data sheet, dense bf16")
            if flops
            else (0.0, f"{name} is not in the table of peaks")
        )
    return gemm_flops(device, torch.float32), "measured fp32 matrix product"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this device: 1536³ on a CPU, 8192³ on a GPU; the best of five, or of as many (two
    at the least) as a fifth of a second allows."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a[: size // 4] @ b  # warms up
    times: list[float] = []
    while len(times) < 2 or (len(times) < 5 and sum(times) < GEMM_S):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
