"""How long ranks talk to each other, from a profile of whole steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]
"""Begin and end, in any one unit."""

_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


@dataclass(frozen=True)
class Traffic:
    """Communication of one rank in one step, in seconds, the wait for slower ranks included."""

    busy_s: float
    """While a collective was under way."""
    exposed_s: float
    """Of that, while this rank computed nothing."""


def start_profile(device: torch.device) -> profile:
    """A profile that has begun, of the CPU and of the GPU if that is the device."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    found = profile(activities=activities)
    found.start()
    return found


def measure_traffic(stopped: profile, device: torch.device, steps: int) -> Traffic:
    """The communication of a profile of so many steps, for one of them.

    On a GPU its kernels count, on a CPU gloo's work and torch's operators.
    """
    events = stopped.events() or []
    on_device = [event for event in events if _is_on(event, device)]
    talking = [_span(event) for event in on_device if event.name.startswith(_COLLECTIVES)]
    working = [_span(event) for event in on_device if _computes(event.name, device)]
    busy, computing = union(talking), union(working)
    alone = length(union([*busy, *computing])) - length(computing)
    exposed = min(max(alone, 0.0), length(busy))  # sums of spans round apart by their last digit
    scale = 1e-6 / steps  # the profiler's spans are in microseconds
    return Traffic(length(busy) * scale, exposed * scale)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch each other, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _is_on(event: Any, device: torch.device) -> bool:
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    return bool(event.device_type == wanted)


def _computes(name: str, device: torch.device) -> bool:
    if device.type == "cuda":
        return not name.startswith(_COLLECTIVES)
    return name.startswith("aten::")


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end
