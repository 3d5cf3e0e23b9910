"""Ranks that do not fit together are named, on a cluster of GPUs that nobody has here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainway.errors import ConfigError
from trainway.smoke.ranks import check_network, check_ranks
from trainway.smoke.report import Check, SmokeSettings, as_json, exit_code, verdict
from trainway.smoke.speed import show_bytes, show_flops


def cluster(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Two machines with two GPUs each; `changes`: by rank, as r3={...}."""
    found = []
    for rank in range(4):
        local = rank % 2
        network = {"interface": "ens1", "address": f"10.0.0.{rank // 2}", "speed_mbit": 100_000}
        found.append(
            {
                "rank": rank, "local_rank": local, "local_world_size": 2, "host": f"node-{rank // 2}",
                "device": "NVIDIA H200", "index": local, "gpu": f"{rank:04x}", "gpus": 2, "trainway": "1",
                "torch": "2.13.0", "numpy": "2.4", "nccl": "2.27.3", "settings": {"seed": 42},
                "variables": {"NCCL_DEBUG": "WARN"},
                "network": {**network, "variables": {"NCCL_SOCKET_IFNAME": "=ens1"}, "doubtful": []},
                **changes.get(f"r{rank}", {}),
            }
        )  # fmt: skip
    return found


def test_ranks_that_fit_pass() -> None:
    check = check_ranks(cluster())
    assert check.status == "ok"
    assert check.text == "4 ranks (2 on node-0, 2 on node-1): 4 x NVIDIA H200, torch 2.13.0"
    assert [rank["gpu"] for rank in check.figures["ranks"]] == ["0000", "0001", "0002", "0003"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r3": {"gpu": "0002"}}, "ranks 2 (node-1), 3 (node-1) drive the same GPU 0002"),
        ({"r1": {"index": 0}}, "rank 1 (node-0) has local rank 1 and drives GPU 0"),
        ({"r2": {"local_rank": 1}}, "node-1 has the local ranks 1, 1"),
        ({"r2": {"device": "NVIDIA A100"}}, "rank 2 (node-1) has device NVIDIA A100 instead of NVIDIA H200"),
        ({"r0": {"nccl": "2.20.1"}}, "rank 0 (node-0) has nccl 2.20.1 instead of 2.27.3"),
        ({"r1": {"settings": {"seed": 7}}}, "rank 1 (node-0) has other settings: seed 7 instead of 42"),
        (
            {"r3": {"variables": {"NCCL_P2P_DISABLE": "1"}}},
            "rank 3 (node-1) has other variables: NCCL_DEBUG None instead of WARN, NCCL_P2P_DISABLE 1 instead of None",
        ),
    ],
)
def test_a_rank_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    check = check_ranks(cluster(**changes))
    assert check.status == "FAIL" and said in check.text.split("; ")


def test_the_network_is_shown_and_doubts_are_warnings() -> None:
    check = check_network(cluster())
    assert check.status == "ok"
    assert check.text == (
        "node-0: ens1 10.0.0.0 100 Gbit/s (NCCL_SOCKET_IFNAME==ens1); "
        "node-1: ens1 10.0.0.1 100 Gbit/s (NCCL_SOCKET_IFNAME==ens1); NCCL_DEBUG=WARN"
    )
    doubtful = {
        **cluster()[2]["network"],
        "doubtful": ["NCCL_SOCKET_IFNAME is eth0, and this machine has ens1"],
    }
    check = check_network(cluster(r2={"network": doubtful}))
    assert check.status == "warn"
    assert check.text.startswith("node-1: NCCL_SOCKET_IFNAME is eth0, and this machine has ens1; node-0: ")


def test_a_warning_passes_and_a_failure_does_not() -> None:
    ok, doubt, bad = Check("a", "ok", ""), Check("b", "warn", "x"), Check("c", "FAIL", "y", {"n": 1})
    assert verdict([ok, doubt]) == "PASS" and exit_code([ok, doubt]) == 0
    assert verdict([ok, bad, ok]) == "FAIL" and exit_code([ok, bad, ok]) == 4
    found = json.loads(as_json(SmokeSettings(), [ok, bad]))
    assert found["checks"][1] == {"name": "c", "status": "fail", "text": "y", "n": 1}
    assert str(bad) == "FAIL  c               y"


def test_settings_reach_the_ranks_as_words() -> None:
    words = SmokeSettings(lr=1e-4, timeout_s=5.5).arguments()
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert told["--lr"] == "0.0001" and told["--timeout"] == "5.5" and told["--batch-size"] == "256"
    with pytest.raises(ConfigError, match="--timeout must be above 0"):
        SmokeSettings(timeout_s=0).check(2)
    with pytest.raises(ConfigError, match="a batch of 256 rows does not do for 300 ranks"):
        SmokeSettings().check(300)


def test_sizes_and_speeds_are_shown_in_their_units() -> None:
    assert [show_bytes(size) for size in (4, 4096, 64 << 20)] == ["4 B", "4 KiB", "64 MiB"]
    assert show_flops(27.64e9) == "27.6 GFLOP/s" and show_flops(790e12) == "790.0 TFLOP/s"
