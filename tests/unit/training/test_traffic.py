"""Communication: time with a collective under way, and how much of it nothing hides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from trainway.training.traffic import Traffic, length, measure_traffic, union


def test_a_union_counts_no_moment_twice() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == [(0, 4), (5, 7)]
    assert union([]) == []
    assert length([(0, 4), (5, 7)]) == 6


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_on_a_cpu_gloo_talks_and_operators_compute() -> None:
    events = [
        event("gloo:all_reduce", 0, 4e6),
        event("gloo:all_reduce", 3e6, 6e6),  # another bucket, at the same time
        event("aten::mm", 1e6, 3e6),
        event("aten::addmm", 2e6, 3.5e6),  # within which it is called
        event("c10d::allreduce_", 0, 9e6),  # only asks for one
        event("autograd::engine::evaluate_function", 0, 9e6),
    ]
    profile: Any = SimpleNamespace(events=lambda: events)
    found = measure_traffic(profile, torch.device("cpu"), steps=2)
    assert found == Traffic(pytest.approx(3.0), pytest.approx((6 - 2.5) / 2))


def test_on_a_gpu_only_kernels_count() -> None:
    events = [
        event("nccl:all_reduce", 0, 9e6),  # the CPU's part
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1e6, 5e6, DeviceType.CUDA),
        event("ampere_sgemm_128x64_tn", 2e6, 5e6, DeviceType.CUDA),
        event("aten::mm", 0, 9e6),
    ]
    profile: Any = SimpleNamespace(events=lambda: events)
    found = measure_traffic(profile, torch.device("cuda"), steps=1)
    assert found == Traffic(pytest.approx(4.0), pytest.approx(1.0))


def test_without_a_collective_there_is_no_communication() -> None:
    profile: Any = SimpleNamespace(events=lambda: [event("aten::mm", 0, 9)])
    assert measure_traffic(profile, torch.device("cpu"), steps=1) == Traffic(0.0, 0.0)
