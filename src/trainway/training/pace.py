"""How fast a run goes by its own measure: a warning, with the cures, when it becomes slow or its GPU idles."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean, median

from trainway.config.schema import WatchdogConfig
from trainway.logs import warn

WINDOW = 20
"""Steps that are recent."""
HISTORY = 1000
"""Steps whose median is the run's own speed."""
IDLE_WINDOW_S = 600.0


class PaceWatch:
    """Is told of every step, and warns once when a run becomes slow: again only after it has been fast in between.

    Rank 0 speaks of the run's speed, each rank of its own GPU.
    """

    def __init__(
        self, watchdog: WatchdogConfig, rank: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watchdog, self._rank, self._clock = watchdog, rank, clock
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._before: deque[float] = deque(maxlen=HISTORY)
        self._shares: list[float] = []
        self._shares_since = clock()
        self._slow = self._idle = False

    def forget(self) -> None:
        """Begin anew: other work has another speed."""
        self._recent.clear()
        self._before.clear()
        self._slow = False

    def step(self, tokens_per_s: float, gpu_utilization: float | None) -> None:
        """One step has ended, at this speed over all ranks; the share of the time for which the GPU worked, if known."""
        if len(self._recent) == WINDOW:
            self._before.append(self._recent[0])
        self._recent.append(tokens_per_s)
        if self._rank == 0 and self._watchdog.throughput_drop and len(self._before) >= WINDOW:
            self._look_at_speed()
        if gpu_utilization is not None and self._watchdog.min_gpu_utilization:
            self._shares.append(gpu_utilization)
            self._look_at_gpu()

    def _look_at_speed(self) -> None:
        usual, recent = median(self._before), median(self._recent)
        slow = recent < (1 - self._watchdog.throughput_drop) * usual
        if slow and not self._slow:
            warn(
                f"{recent:,.0f} tokens/s in the last {WINDOW} steps, where {usual:,.0f} are usual in this run; see "
                "whether other programs use these machines, whether a GPU is throttled (nvidia-smi -q -d PERFORMANCE), "
                "and whether the data's disk is slow; `trainway smoke` names a slow rank"
            )
        self._slow = slow

    def _look_at_gpu(self) -> None:
        if self._clock() - self._shares_since < IDLE_WINDOW_S:
            return
        share = fmean(self._shares)
        idle = share < self._watchdog.min_gpu_utilization
        if idle and not self._idle:
            warn(
                f"rank {self._rank} ({socket.gethostname()}): its GPU worked for {share:.0%} of the last "
                f"{IDLE_WINDOW_S / 60:.0f} minutes; raise train.micro_batch_size with less accumulation, "
                "data.prefetch_steps or train.num_threads, and see whether evaluations and saves are too frequent"
            )
        self._idle = idle
        self._shares.clear()
        self._shares_since = self._clock()
