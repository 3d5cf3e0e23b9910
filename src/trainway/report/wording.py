"""Figures as a person reads them: counts, bytes, times, dollars."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def count(value: float) -> str:
    """`694`, `12,340`, `1.43M`, `3.02B`: three figures are enough for what is large."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """`3.1 GiB`, `512 MiB`."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """`850 ms`, `42 s`, `7 min 05 s`, `3 h 20 min`, `11 d 4 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def dollars(value: float) -> str:
    """`$0.31`, `$12.40`, `$31,270`."""
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"


def share(value: float) -> str:
    """`41.2 %`."""
    return f"{value:.1%}".replace("%", " %")


def loss(value: float | None) -> str:
    """Four digits after the point; words for what is no number."""
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def day(stamp: object) -> str:
    """An ISO time as `2026-11-22 04:57 UTC`; as it stands where it is none."""
    try:
        found = datetime.fromisoformat(str(stamp))
    except ValueError:
        return str(stamp)
    return f"{(found.astimezone(UTC) if found.tzinfo else found):%Y-%m-%d %H:%M} UTC"
