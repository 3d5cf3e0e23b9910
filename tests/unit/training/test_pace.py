"""A run that becomes slow by its own measure, and a GPU that idles, are told once, with the cure."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
import torch

from trainway.config.schema import WatchdogConfig
from trainway.training.gpu import GpuWatch, utilization_of, watch_gpu
from trainway.training.pace import IDLE_WINDOW_S, WINDOW, PaceWatch


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("trainway"), "propagate", True)
    return caplog


def run(pace: PaceWatch, *speeds: float) -> None:
    for speed in speeds:
        pace.step(speed, None)


def test_a_drop_is_told_once_and_again_after_a_recovery(warnings: pytest.LogCaptureFixture) -> None:
    pace = PaceWatch(WatchdogConfig(throughput_drop=0.5), rank=0)
    run(pace, *[1000.0] * 100)
    run(pace, *[510.0] * 2 * WINDOW)  # not yet half
    run(pace, *[10.0] * 5, *[1000.0] * 30)  # a few slow steps are no drop
    assert warnings.messages == []
    run(pace, *[400.0] * 2 * WINDOW)
    (said,) = warnings.messages
    assert said.startswith(
        "warning: 400 tokens/s in the last 20 steps, where 1,000 are usual in this run; see "
    )
    run(pace, *[1000.0] * 2 * WINDOW, *[400.0] * 2 * WINDOW)
    assert len(warnings.messages) == 2


def test_nothing_is_told_early_after_other_work_by_other_ranks_or_when_off(
    warnings: pytest.LogCaptureFixture,
) -> None:
    early = PaceWatch(WatchdogConfig(), rank=0)
    run(early, *[1000.0] * WINDOW, *[1.0] * (WINDOW - 1))
    other = PaceWatch(WatchdogConfig(), rank=0)
    run(other, *[1000.0] * 100)
    other.forget()
    run(other, *[1.0] * 100)
    run(PaceWatch(WatchdogConfig(), rank=1), *[1000.0] * 100, *[1.0] * 100)
    run(PaceWatch(WatchdogConfig(throughput_drop=0), rank=0), *[1000.0] * 100, *[1.0] * 100)
    assert warnings.messages == []


def test_a_gpu_that_idles_is_told_by_its_own_rank(warnings: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    pace = PaceWatch(WatchdogConfig(min_gpu_utilization=0.3), rank=3, clock=lambda: now[0])
    for share in [0.1, 0.2] * 4:
        now[0] += IDLE_WINDOW_S / 4
        pace.step(1000.0, share)
    (said,) = warnings.messages  # after ten minutes, and not again after twenty
    assert said.startswith("warning: rank 3 (") and "its GPU worked for 15% of the last 10 minutes" in said
    for share in [0.9] * 4 + [0.1] * 4:
        now[0] += IDLE_WINDOW_S / 4
        pace.step(1000.0, share)
    assert len(warnings.messages) == 2


class FakeNvml:
    """Knows one GPU, which is busy for 42 % of the time until it falls off the bus."""

    lost = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return 0 if uuid == b"GPU-1234" else 6

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, rates: Any) -> int:  # noqa: N802
        assert handle.value == 7 and ctypes.sizeof(rates._obj) == 8
        rates._obj.gpu, rates._obj.memory = 42, 99
        return 15 if self.lost else 0


def test_the_driver_is_asked_for_the_gpu_by_its_uuid() -> None:
    nvml: Any = FakeNvml()
    ask = utilization_of("GPU-1234", nvml)
    assert ask is not None and ask() == 0.42
    nvml.lost = True
    assert ask() is None
    assert utilization_of("GPU-5678", nvml) is None
    assert watch_gpu(torch.device("cpu")) is None


def test_the_share_is_the_mean_since_the_last_call() -> None:
    answers = iter([0.2, 0.4, None])
    watch = GpuWatch(lambda: next(answers), every_s=0.0)
    watch._thread.join()
    assert watch.share() == pytest.approx(0.3)
    assert watch.share() == pytest.approx(0.3)  # nothing came since
