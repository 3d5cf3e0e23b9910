"""Who takes part: every rank with its host, device and versions, and the network between them."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil
import torch

from trainway import __version__
from trainway.engines.world import World
from trainway.launch.network import doubtful_settings, local_interfaces, own_addresses, source_address
from trainway.smoke.report import Check, SmokeSettings, name_ranks, odd_ones

_SHOWN_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
_SAME = ("settings", "trainway", "torch", "numpy", "nccl", "device", "local_world_size", "variables")
"""What must be the same on every rank."""


def describe_rank(world: World, settings: SmokeSettings) -> dict[str, Any]:
    """What this rank says of itself."""
    on_gpu = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if on_gpu else None
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN_PREFIXES) and "IFNAME" not in name
    }
    return {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "local_world_size": world.local_world_size,
        "host": socket.gethostname(),
        "device": properties.name if properties else "cpu",
        "index": world.device.index if on_gpu else None,
        "gpu": str(properties.uuid) if properties else None,
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "trainway": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "settings": asdict(settings),
        "variables": variables,
        "network": _network(),
    }


def check_ranks(found: Sequence[Mapping[str, Any]]) -> Check:
    """Every rank is there once, drives a device of its own, and runs the same as the others."""
    hosts = [one["host"] for one in found]
    problems = [*_mismatches(found, hosts), *_places(found, hosts)]
    devices = ", ".join(f"{number} x {name}" for name, number in Counter(o["device"] for o in found).items())
    machines = Counter(hosts)
    spread = ", ".join(f"{number} on {host}" for host, number in machines.items())
    figures = {
        "ranks": [{key: o[key] for key in ("rank", "local_rank", "host", "device", "gpu")} for o in found]
    }
    text = f"{len(found)} rank{'s' * (len(found) > 1)} ({spread}): {devices}, torch {found[0]['torch']}"
    if problems:
        return Check("ranks", "FAIL", "; ".join(problems), figures)
    return Check("ranks", "ok", text, figures)


def _mismatches(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    problems = []
    for name in _SAME:
        values = [one[name] for one in found]
        odd = odd_ones(values)
        for rank in odd:
            usual = max(values, key=values.count)
            who = name_ranks([rank], hosts)
            if isinstance(usual, dict):
                keys = sorted(k for k in {*usual, *values[rank]} if usual.get(k) != values[rank].get(k))
                said = ", ".join(f"{k} {values[rank].get(k)} instead of {usual.get(k)}" for k in keys)
                problems.append(f"{who} has other {name}: {said}")
            else:
                problems.append(f"{who} has {name.replace('_', ' ')} {values[rank]} instead of {usual}")
    return problems


def _places(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    problems = []
    owners: dict[tuple[str, str], int] = {}
    for one in found:
        if one["gpu"] is not None:
            first = owners.setdefault((one["host"], one["gpu"]), one["rank"])
            if first != one["rank"]:
                both = name_ranks([first, one["rank"]], hosts)
                problems.append(f"{both} drive the same GPU {one['gpu']}")
            if one["index"] != one["local_rank"]:
                who = name_ranks([one["rank"]], hosts)
                problems.append(f"{who} has local rank {one['local_rank']} and drives GPU {one['index']}")
    for host in dict.fromkeys(hosts):
        here = sorted(one["local_rank"] for one in found if one["host"] == host)
        # several nodes may be one machine, as in a test: then each local rank is there equally often
        times = Counter(Counter(here).values())
        if sorted(set(here)) != list(range(len(set(here)))) or len(times) > 1:
            problems.append(f"{host} has the local ranks {', '.join(map(str, here))}")
    return problems


def check_network(found: Sequence[Mapping[str, Any]]) -> Check:
    """Which interface each machine talks through, what it is told by variables, and what is doubtful about them."""
    machines = {one["host"]: one["network"] for one in reversed(found)}
    parts, doubts = [], []
    for host, network in sorted(machines.items()):
        speed = f" {network['speed_mbit'] / 1000:g} Gbit/s" if network["speed_mbit"] else ""
        told = ", ".join(f"{name}={value}" for name, value in network["variables"].items())
        place = f"{network['interface'] or 'no interface'} {network['address']}{speed}"
        parts.append(f"{host}: {place}{f' ({told})' if told else ''}")
        doubts += [f"{host}: {note}" for note in network["doubtful"]]
    shown = found[0]["variables"]
    if shown:
        parts.append(", ".join(f"{name}={value}" for name, value in shown.items()))
    text = "; ".join([*doubts, *parts])
    return Check("network", "warn" if doubts else "ok", text, {"machines": machines, "variables": shown})


def _network() -> dict[str, Any]:
    master = os.environ.get("MASTER_ADDR")
    addresses = own_addresses(os.environ, master, source_address)
    interfaces = local_interfaces()
    named = next(
        ((name, address) for address in addresses for name, held in interfaces.items() if address in held),
        ("", addresses[0] if addresses else ""),
    )
    states = psutil.net_if_stats()
    return {
        "interface": named[0],
        "address": named[1],
        "speed_mbit": states[named[0]].speed if named[0] in states else 0,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.endswith("_IFNAME")},
        "doubtful": doubtful_settings(),
    }
