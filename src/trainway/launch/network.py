"""The network between the nodes of a run: which interface carries it, and what NCCL and gloo are told about it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
MASTER_VARIABLES = ("MASTER_ADDR", "PRIMARY_ADDR")
"""Where the first node is; the second name is that of RunPod's Instant Clusters."""
OBSOLETE_VARIABLES = {
    "NCCL_ASYNC_ERROR_HANDLING": "use TORCH_NCCL_ASYNC_ERROR_HANDLING, which is on by itself",
    "NCCL_BLOCKING_WAIT": "use TORCH_NCCL_BLOCKING_WAIT",
    "TRANSFORMERS_CACHE": "use HF_HOME",
}

_OUTSIDE = "192.0.2.1"  # an address that nobody has: what leads there is the default route
_ANY_PORT = 9  # connecting a datagram socket sends nothing

Interfaces = Mapping[str, list[str]]
"""Name of each interface that is up → its addresses."""


def communication_environment(
    environ: Mapping[str, str] = os.environ,
    *,
    master: str | None = None,
    interfaces: Callable[[], Interfaces] | None = None,
    address_towards: Callable[[str], str | None] | None = None,
) -> dict[str, str]:
    """The variables that a node of a run over several nodes needs besides those that the user has set.

    NCCL takes the first interface that is not loopback or docker, and gloo the one that the host's name resolves to:
    on a machine with several networks either may be one that the other nodes cannot reach. So both are told the
    interface that has NODE_ADDR, else that of the route to the first node, else that of the default route. What the
    user has set stays. InfiniBand is left alone: NCCL finds it by itself, and is kept from nothing.

    One node needs none of this: its processes reach each other over any interface.

    Args:
        master: address of the first node; empty means that of MASTER_ADDR or PRIMARY_ADDR.
        interfaces, address_towards: how the machine is asked.
    """
    missing = [name for name in INTERFACE_VARIABLES if not environ.get(name)]
    if not missing:
        return {}
    found = (interfaces or local_interfaces)()
    for address in own_addresses(environ, master, address_towards or source_address):
        names = [name for name, held in found.items() if address in held]
        if names:
            # "=" keeps NCCL from taking eth10 for eth1; gloo always means the whole name
            return {name: f"={names[0]}" if name.startswith("NCCL") else names[0] for name in missing}
    return {}


def own_addresses(
    environ: Mapping[str, str], master: str | None, address_towards: Callable[[str], str | None]
) -> list[str]:
    """This node's addresses that other nodes may reach it by, the most certain first."""
    named = environ.get("NODE_ADDR", "").partition("/")[0]
    hosts = [master, *(environ.get(name) for name in MASTER_VARIABLES), _OUTSIDE]
    routed = [address_towards(host) for host in hosts if host]
    return [_plain(address) for address in dict.fromkeys([named, *routed]) if address]


def source_address(host: str) -> str | None:
    """The address that packets from here to `host` carry; None when the name is unknown or nothing leads there."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def local_interfaces() -> dict[str, list[str]]:
    """The interfaces that are up, with their IPv4 and IPv6 addresses."""
    states = psutil.net_if_stats()
    return {
        name: [_plain(item.address) for item in items if item.family in (socket.AF_INET, socket.AF_INET6)]
        for name, items in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def doubtful_settings(
    environ: Mapping[str, str] = os.environ,
    *,
    infiniband: Path = Path("/sys/class/infiniband"),
    interfaces: Callable[[], Interfaces] | None = None,
) -> list[str]:
    """What the user's environment says that is obsolete, or wrong on this machine; one line each."""
    notes = [f"{name} is obsolete: {cure}" for name, cure in OBSOLETE_VARIABLES.items() if environ.get(name)]
    if environ.get("NCCL_IB_DISABLE") == "1" and infiniband.is_dir() and any(infiniband.iterdir()):
        notes.append("NCCL_IB_DISABLE=1 keeps NCCL from the InfiniBand of this machine: unset it")
    known: list[str] | None = None
    for name in INTERFACE_VARIABLES:
        wanted = environ.get(name, "")
        if not wanted or wanted.startswith("^"):
            continue
        known = list((interfaces or local_interfaces)()) if known is None else known
        if not _matches(wanted, known):
            notes.append(f"{name} is {wanted}, and this machine has {', '.join(known) or 'no interface'}")
    return notes


def _matches(wanted: str, known: list[str]) -> bool:
    """Whether a value of NCCL_SOCKET_IFNAME (prefixes, or after `=` whole names) fits an interface."""
    names = [name.partition(":")[0] for name in wanted.removeprefix("=").split(",")]
    if wanted.startswith("="):
        return any(name in known for name in names)
    return any(interface.startswith(name) for name in names for interface in known)


def _plain(address: str) -> str:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).compressed  # fe80::1%eth0
    except ValueError:
        return address
