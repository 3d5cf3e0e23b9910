"""A run with wsd and z-loss: the metrics it writes, and the same on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import metrics, run_cli, tiny, write_config
from trainway.config.load import load_config
from trainway.config.resolved import config_difference, fingerprint

pytestmark = pytest.mark.slow
"""Schedules and the loss have tests of their own, in tests/unit; this is the whole command."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("z_loss")
    done = {}
    for name, nproc, z_loss in (("with", 1, 0.01), ("ranks", 2, 0.01), ("without", 1, 0.0)):
        done[name] = root / name
        config = tiny(corpus, store_dir, done[name], total_steps=8, z_loss=z_loss)
        config["schedule"] = {"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.5, "decay_shape": "linear"}
        run_cli("train", write_config(root / f"{name}.yaml", config), "--nproc", nproc)
    return done


def test_the_rate_follows_wsd(runs: dict[str, Path]) -> None:
    rates = [record["optim/lr"] for record in metrics(runs["with"])]
    factors = [0.5, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
    assert rates == pytest.approx([3e-3 * factor for factor in factors])


def test_the_z_loss_is_logged_beside_the_pure_cross_entropy(runs: dict[str, Path]) -> None:
    on, off = metrics(runs["with"]), metrics(runs["without"])
    # the first step's weights are the same in both: about log(V) = 6 nats, and 0.01 log(V)^2
    assert on[0]["train/loss"] == off[0]["train/loss"]
    assert on[0]["train/z_loss"] == pytest.approx(0.01 * on[0]["train/loss"] ** 2, rel=0.02)
    assert on[-1]["train/z_loss"] < on[0]["train/z_loss"]
    assert on[0]["optim/grad_norm"] != off[0]["optim/grad_norm"]
    assert not any("train/z_loss" in record for record in off)


def test_validation_is_the_pure_cross_entropy(runs: dict[str, Path]) -> None:
    on, off = (metrics(runs[name], "val/loss") for name in ("with", "without"))
    assert on[0] == off[0]
    assert on[-1]["val/loss"] == pytest.approx(off[-1]["val/loss"], rel=0.02)


def test_two_ranks_give_the_same_losses(runs: dict[str, Path]) -> None:
    for a, b in zip(metrics(runs["with"]), metrics(runs["ranks"]), strict=True):
        for key in ("train/loss", "train/z_loss", "optim/grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_a_run_that_goes_on_keeps_its_z_loss(runs: dict[str, Path]) -> None:
    on, off = (fingerprint(load_config(runs[name] / "config.yaml").config) for name in ("with", "without"))
    changes = config_difference(on, off)
    assert "train.z_loss: 0.01 -> 0.0" in changes
