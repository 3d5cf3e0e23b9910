"""Figures as a person reads them."""

from __future__ import annotations

import pytest

from trainway.report.wording import count, day, dollars, duration, loss, share, size


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (count(694), "694"),
        (count(12_340), "12,340"),
        (count(1_430_000), "1.43M"),
        (count(209_700_000_000), "210B"),
        (size(512 * 2**20), "512.0 MiB"),
        (size(3.14 * 2**30), "3.1 GiB"),
        (size(100), "0.1 KiB"),
        (duration(0.85), "850 ms"),
        (duration(59.6), "1 min 00 s"),
        (duration(425), "7 min 05 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(12_000), "3 h 20 min"),
        (duration(48 * 3600), "2 d 0 h"),
        (duration(268 * 3600), "11 d 4 h"),
        (dollars(0.31), "$0.31"),
        (dollars(31_270), "$31,270"),
        (share(0.412), "41.2 %"),
        (loss(2.5), "2.5000"),
        (loss(float("nan")), "not a number"),
        (loss(None), ""),
        (day("2026-11-22T04:57:37+00:00"), "2026-11-22 04:57 UTC"),
        (day("2026-11-22T05:57:37+01:00"), "2026-11-22 04:57 UTC"),
        (day("2026-11-22T04:57:37Z"), "2026-11-22 04:57 UTC"),
        (day("yesterday"), "yesterday"),
    ],
)
def test_figures(said: str, wanted: str) -> None:
    assert said == wanted
