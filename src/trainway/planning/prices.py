"""What a GPU costs by the hour: list prices of one provider, each with its date, shipped or asked for anew (no torch)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainway.errors import ConfigError
from trainway.files import atomic_write
from trainway.planning.gpus import Gpu, find_gpu
from trainway.planning.measured import state_dir

SHIPPED = Path(__file__).with_name("prices.json")
API = "https://api.runpod.io/v2"
API_VARIABLE = "TRAINWAY_RUNPOD_API"
KEY_VARIABLE = "RUNPOD_API_KEY"
PROVIDER = "RunPod"
OFFER = "Secure Cloud, on demand, list price of one GPU"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Price:
    """What one GPU costs for an hour; `date` is the UTC day on which the provider said so."""

    usd_per_hour: float
    date: str
    provider: str = PROVIDER
    offer: str = OFFER

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.provider, self.offer, self.date) if part)
        return f"${self.usd_per_hour:.2f} per GPU-hour ({where})"


@dataclass(frozen=True)
class PriceList:
    """Prices by a GPU's name in the catalogue, and what is to be said of where they are from."""

    prices: Mapping[str, Price]
    note: str = ""

    def of(self, gpu: Gpu) -> Price | None:
        return self.prices.get(gpu.name)


def load_prices(directory: Path | None = None) -> PriceList:
    """The newer of what is shipped and of what `refresh_prices` has kept, for each GPU."""
    prices = _read(SHIPPED)
    kept = (directory or state_dir()) / SHIPPED.name
    if kept.is_file():
        try:
            found = _read(kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return PriceList(prices, f"{kept} is passed over ({type(error).__name__}: {error})")
        prices |= {
            name: price
            for name, price in found.items()
            if name not in prices or price.date > prices[name].date
        }
    return PriceList(prices)


def refresh_prices(
    directory: Path | None = None,
    *,
    api: str | None = None,
    environ: Mapping[str, str] = os.environ,
    timeout_s: float = TIMEOUT_S,
) -> PriceList:
    """Ask RunPod's catalogue for today's prices and keep them; the key is RUNPOD_API_KEY.

    Whatever fails (no key, no network, a refusal, an answer of another form), the prices that are known stay, and
    `note` says why. `api`: base URL; empty means TRAINWAY_RUNPOD_API, else RunPod's.
    """
    from urllib.error import HTTPError

    directory = directory or state_dir()
    key = environ.get(KEY_VARIABLE)
    if not key:
        return _known(directory, f"{KEY_VARIABLE} is not set")
    base = api or environ.get(API_VARIABLE) or API
    try:
        content = _ask(f"{base.rstrip('/')}/catalog/gpus", key, timeout_s)
        prices = _parse(content, datetime.now(UTC).date().isoformat())
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / SHIPPED.name, _to_text(prices))
    except HTTPError as error:
        return _known(directory, f"the catalogue answered {error.code} {error.reason}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _known(directory, f"{type(error).__name__}: {error}")
    return load_prices(directory)


def _known(directory: Path, why: str) -> PriceList:
    known = load_prices(directory)
    note = f"prices are not refreshed: {why}; those of the dates shown are used"
    return PriceList(known.prices, "; ".join(part for part in (note, known.note) if part))


def _ask(url: str, key: str, timeout_s: float) -> Any:
    from urllib.request import Request, urlopen  # takes longer to import than a plan to make

    # its errors do not show a request's headers, so no message can show the key
    request = Request(url, headers={"Authorization": f"Bearer {key}", "Accept": "application/json"})
    with urlopen(request, timeout=timeout_s) as answer:
        return json.loads(answer.read())


def _parse(content: Any, date: str) -> dict[str, Price]:
    """{GPU's name: price} of `{"gpus": [{"id", "secure", "price": {"secure", ...}}, ...]}`.

    GPUs that are not in the catalogue or not on offer are left out; of several that are one here, the cheapest counts.
    """
    prices: dict[str, Price] = {}
    for entry in content["gpus"]:
        usd = float(entry["price"]["secure"])
        try:
            gpu = find_gpu(str(entry["id"]))
        except ConfigError:
            continue
        if gpu.is_cpu or not entry["secure"] or usd <= 0:
            continue
        if gpu.name not in prices or usd < prices[gpu.name].usd_per_hour:
            prices[gpu.name] = Price(usd, date)
    if not prices:
        raise ValueError("the answer has no price of a GPU in the catalogue")
    return prices


def _read(path: Path) -> dict[str, Price]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Price(
            float(entry["usd_per_hour"]), str(entry["date"]), str(content["provider"]), str(content["offer"])
        )
        for name, entry in content["prices"].items()
    }


def _to_text(prices: Mapping[str, Price]) -> str:
    body = {
        "provider": PROVIDER,
        "offer": OFFER,
        "currency": "USD",
        "prices": {
            name: {"usd_per_hour": price.usd_per_hour, "date": price.date} for name, price in prices.items()
        },
    }
    return json.dumps(body, indent=2) + "\n"
