"""Which interface NCCL and gloo are told, on machines that are made up here."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest

from trainway.launch.network import (
    communication_environment,
    doubtful_settings,
    local_interfaces,
    source_address,
)

MACHINE = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["203.0.113.7"],
    "ens1": ["10.65.0.3", "fd00::3"],
}
ROUTES = {"10.65.0.2": "10.65.0.3", "node-0.job": "10.65.0.3", "127.0.0.1": "127.0.0.1", "fd00::2": "fd00::3"}


def told(routes: dict[str, str] | None = None, master: str | None = None, **environ: str) -> dict[str, str]:
    known = {**ROUTES, "192.0.2.1": "203.0.113.7"} if routes is None else routes
    return communication_environment(
        environ, master=master, interfaces=lambda: MACHINE, address_towards=known.get
    )


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"MASTER_ADDR": "10.65.0.2"}, "ens1"),  # not eth0, which has the default route
        ({"MASTER_ADDR": "node-0.job"}, "ens1"),
        ({"MASTER_ADDR": "fd00::2"}, "ens1"),
        ({"PRIMARY_ADDR": "10.65.0.2"}, "ens1"),
        ({"NODE_ADDR": "10.65.0.3", "MASTER_ADDR": "unknown.host"}, "ens1"),
        ({"NODE_ADDR": "10.65.0.3/24"}, "ens1"),
        ({"NODE_ADDR": "10.99.0.1", "MASTER_ADDR": "10.65.0.2"}, "ens1"),  # NODE_ADDR of some other machine
        ({"MASTER_ADDR": "unknown.host"}, "eth0"),  # its name is not known yet: the default route
        ({"MASTER_ADDR": "127.0.0.1"}, "lo"),
    ],
)
def test_the_interface_is_found_by_its_address(environ: dict[str, str], name: str) -> None:
    assert told(**environ) == {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}


def test_the_first_node_given_to_torchrun_counts_before_the_environment() -> None:
    assert told(master="127.0.0.1", MASTER_ADDR="10.65.0.2")["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_the_user_set_stays() -> None:
    assert told(MASTER_ADDR="10.65.0.2", NCCL_SOCKET_IFNAME="ib0") == {"GLOO_SOCKET_IFNAME": "ens1"}
    assert told(MASTER_ADDR="10.65.0.2", NCCL_SOCKET_IFNAME="ib0", GLOO_SOCKET_IFNAME="eth0") == {}


def test_a_machine_without_a_route_is_left_alone() -> None:
    assert told(routes={}, MASTER_ADDR="10.65.0.2") == {}


def test_infiniband_is_never_switched_off() -> None:
    assert not any("IB" in name for name in told(MASTER_ADDR="10.65.0.2"))


def test_this_machine_has_a_loopback_interface_that_its_route_leads_over() -> None:
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert source_address("no-such-host.invalid") is None
    names = [name for name, held in local_interfaces().items() if "127.0.0.1" in held]
    assert len(names) == 1
    flags = psutil.net_if_stats()[names[0]].flags
    assert "loopback" in flags
    found = communication_environment({"MASTER_ADDR": "127.0.0.1"})
    assert found == {"NCCL_SOCKET_IFNAME": f"={names[0]}", "GLOO_SOCKET_IFNAME": names[0]}


def test_interfaces_that_are_down_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def item(address: str, family: int = socket.AF_INET) -> object:
        return type("Address", (), {"family": family, "address": address})

    found = {
        "up": [item("10.0.0.1"), item("FD00::1%up", socket.AF_INET6), item("aa:bb", -1)],
        "down": [item("10.0.0.2")],
    }
    states = {name: type("Stats", (), {"isup": name == "up"}) for name in found}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    assert local_interfaces() == {"up": ["10.0.0.1", "fd00::1"]}


def test_doubtful_settings_are_named(tmp_path: Path) -> None:
    def notes(infiniband: Path = tmp_path, **environ: str) -> list[str]:
        return doubtful_settings(environ, infiniband=infiniband, interfaces=lambda: MACHINE)

    assert notes(NCCL_SOCKET_IFNAME="ens", GLOO_SOCKET_IFNAME="=eth0", NCCL_IB_DISABLE="1") == []
    assert notes(NCCL_SOCKET_IFNAME="^docker") == []
    assert notes(NCCL_SOCKET_IFNAME="bond0") == [
        "NCCL_SOCKET_IFNAME is bond0, and this machine has lo, docker0, eth0, ens1"
    ]
    assert notes(NCCL_SOCKET_IFNAME="=ens") != []  # whole names only
    assert notes(NCCL_SOCKET_IFNAME="=bond0,ens1:0") == []
    assert "HF_HOME" in notes(TRANSFORMERS_CACHE="/x")[0]
    assert "TORCH_NCCL" in notes(NCCL_ASYNC_ERROR_HANDLING="1")[0]
    (tmp_path / "mlx5_0").mkdir()
    assert "InfiniBand" in notes(NCCL_IB_DISABLE="1")[0]
    assert notes(tmp_path / "none", NCCL_IB_DISABLE="1") == []
