"""Prices: shipped with dates, refreshed from a server that answers as RunPod's document says, kept when it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.servers import QuietHandler, http_server
from trainway.planning.gpus import GPUS, find_gpu
from trainway.planning.prices import load_prices, refresh_prices

KEY = "a-key-of-nobody"


class Catalogue:
    """A server of GET /v2/catalog/gpus; what it answers is set by the test, what it was asked is kept."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(QuietHandler):
            def answer(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                self.reply(outer.status, outer.body, {"Content-Type": "application/json"})

        self.handler, self.url = Handler, ""

    def answer(self, *gpus: dict[str, Any]) -> None:
        self.status, self.body = 200, json.dumps({"gpus": gpus}).encode()


@pytest.fixture
def catalogue() -> Iterator[Catalogue]:
    served = Catalogue()
    with http_server(served.handler) as url:
        served.url = f"{url}/v2"
        yield served


def entry(name: str, secure: float, *, offered: bool = True) -> dict[str, Any]:
    """One GPU as the published schema has it."""
    return {
        "id": name,
        "name": name.removeprefix("NVIDIA "),
        "pool": None,
        "manufacturer": "NVIDIA",
        "memory": 80,
        "secure": offered,
        "community": True,
        "price": {"secure": secure, "community": secure / 2},
        "maxCount": {"secure": 8, "community": 4},
    }


def refresh(directory: Path, catalogue: Catalogue, key: str = KEY) -> Any:
    return refresh_prices(directory, api=catalogue.url, environ={"RUNPOD_API_KEY": key}, timeout_s=5)


def test_shipped_prices_have_dates_and_are_of_the_catalogue(tmp_path: Path) -> None:
    shipped = load_prices(tmp_path)
    assert set(shipped.prices) <= {gpu.name for gpu in GPUS}
    for name in ("A100-80", "H100 PCIe", "H100", "H200", "B200", "L40S", "RTX 4090"):
        price = shipped.prices[name]
        assert 0.1 < price.usd_per_hour < 20
        assert datetime.fromisoformat(price.date) < datetime.now()
        assert str(price).endswith(f"(RunPod, Secure Cloud, on demand, list price of one GPU, {price.date})")
    assert shipped.of(find_gpu("RTX 3090")) is None
    assert shipped.note == ""


def test_a_refresh_is_kept_with_todays_date(tmp_path: Path, catalogue: Catalogue) -> None:
    catalogue.answer(
        entry("NVIDIA H100 80GB HBM3", 3.21),
        entry("NVIDIA RTX PRO 6000 Blackwell Server Edition", 1.91),
        entry("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1.71),
        entry("NVIDIA H200 NVL", 1.0),  # another card than the H200
        entry("NVIDIA Tesla T4", 0.2),
        entry("NVIDIA B200", 0.5, offered=False),
    )
    today = datetime.now(UTC).date().isoformat()
    found = refresh(tmp_path / "new", catalogue)
    assert catalogue.asked == [("/v2/catalog/gpus", f"Bearer {KEY}")]
    assert found.note == ""
    assert (found.prices["H100"].usd_per_hour, found.prices["H100"].date) == (3.21, today)
    assert found.prices["RTX PRO 6000"].usd_per_hour == 1.71
    shipped = load_prices(tmp_path)
    for name in ("H200", "B200", "L4"):
        assert found.prices[name] == shipped.prices[name]
    assert load_prices(tmp_path / "new") == found
    assert KEY not in (tmp_path / "new/prices.json").read_text()


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, b'{"title": "Unauthorized", "status": 401, "detail": "no"}', "the catalogue answered 401"),
        (500, b"", "the catalogue answered 500"),
        (200, b"<html>", "JSONDecodeError"),
        (200, b'{"gpus": []}', "no price of a GPU"),
        (200, b'{"pods": []}', "KeyError"),
        (200, b'{"gpus": [{"id": "NVIDIA H100 PCIe", "price": null}]}', "TypeError"),
        (200, b"[]", "TypeError"),
    ],
)
def test_a_failure_falls_back_and_says_so(
    tmp_path: Path, catalogue: Catalogue, status: int, body: bytes, why: str
) -> None:
    catalogue.status, catalogue.body = status, body
    found = refresh(tmp_path, catalogue)
    assert found.note.startswith("prices are not refreshed: ")
    assert why in found.note and KEY not in found.note
    assert found.prices == load_prices(tmp_path).prices
    assert not list(tmp_path.iterdir())


def test_without_a_key_or_a_network(tmp_path: Path) -> None:
    without = refresh_prices(tmp_path, environ={})
    assert "RUNPOD_API_KEY is not set" in without.note
    found = refresh_prices(
        tmp_path, api="http://127.0.0.1:9/v2", environ={"RUNPOD_API_KEY": KEY}, timeout_s=5
    )
    assert "URLError" in found.note
    assert without.prices == found.prices == load_prices(tmp_path).prices


def test_what_was_kept_before_outlives_a_failure(tmp_path: Path, catalogue: Catalogue) -> None:
    catalogue.answer(entry("NVIDIA H100 PCIe", 2.22))
    refresh(tmp_path, catalogue)
    catalogue.status = 429
    assert refresh(tmp_path, catalogue).prices["H100 PCIe"].usd_per_hour == 2.22


def test_a_damaged_file_of_kept_prices_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text("{")
    found = load_prices(tmp_path)
    assert "prices.json is passed over" in found.note
    assert found.prices["H100"].usd_per_hour > 0


def test_an_older_kept_price_does_not_replace_a_newer_shipped_one(tmp_path: Path) -> None:
    old = {"H100": {"usd_per_hour": 99.0, "date": "2020-01-01"}}
    (tmp_path / "prices.json").write_text(json.dumps({"provider": "x", "offer": "y", "prices": old}))
    assert load_prices(tmp_path).prices["H100"].usd_per_hour < 20
