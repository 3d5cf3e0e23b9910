"""What a run costs by the hour, and who says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainway.planning.gpus import gpu_of_device
from trainway.planning.prices import PriceList


@dataclass(frozen=True)
class Cost:
    """Dollars spent at one moment, and those that every hour adds while it goes on."""

    per_hour: float
    spent: float
    """Up to `at`."""
    at: float
    """Seconds since 1970."""
    goes_on: bool
    source: str
    """Who says so: a job, or a list of prices with its date."""

    def to_json(self) -> dict[str, Any]:
        """For the page, which counts on from `at` by itself."""
        return {
            "per_hour": self.per_hour,
            "spent": round(self.spent, 4),
            "at": self.at,
            "goes_on": self.goes_on,
            "source": self.source,
        }


def list_price(prices: PriceList, device: str, processes: int) -> tuple[float, str] | None:
    """(dollars per hour of all GPUs, source) by the list of prices; None for a device that has none there."""
    gpu = gpu_of_device(device) if device else None
    price = prices.of(gpu) if gpu is not None else None
    if gpu is None or price is None:
        return None
    return (
        price.usd_per_hour * processes,
        f"{processes} x {gpu.name}, {price.provider}'s list price of {price.date}",
    )


def costs_at_list_price(
    per_hour: float, source: str, began: float | None, until: float, *, goes_on: bool
) -> Cost | None:
    """The cost of a launch that began then; None while that is not known."""
    if began is None:
        return None
    hours = max(0.0, until - began) / 3600
    return Cost(per_hour, per_hour * hours, until, goes_on, f"{source}; since the last start")


def number(found: Mapping[str, Any], name: str) -> float:
    """A finite number of a record, or 0."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if abs(value) < 1e15 else 0.0
