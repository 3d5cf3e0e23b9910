"""Every engine trains as one process does: per-step losses, gradient norms, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import metrics, run_cli, tiny, write_config

ENGINES = {"single": 1, "ddp": 2}
OPTIMIZERS = ("adamw", "muon")


@pytest.fixture(scope="module", params=OPTIMIZERS)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    done = {}
    for engine, nproc in ENGINES.items():
        done[engine] = root / engine
        config = tiny(corpus, store_dir, done[engine])
        config["optim"] = {"lr": 3e-3, "name": request.param}
        path = write_config(root / f"{engine}.yaml", config)
        run_cli("train", path, "--nproc", nproc, f"engine.name={engine}")
    return done


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "single"])
def test_losses_and_gradient_norms_equal_single(runs: dict[str, Path], engine: str) -> None:
    reference, other = metrics(runs["single"]), metrics(runs[engine])
    assert len(reference) == len(other) == 20
    for a, b in zip(reference, other, strict=True):
        assert a["samples"] == b["samples"]
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["optim/grad_norm"] == pytest.approx(a["optim/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "single"])
def test_validation_and_weights_equal_single(runs: dict[str, Path], engine: str) -> None:
    for a, b in zip(metrics(runs["single"], "val/loss"), metrics(runs[engine], "val/loss"), strict=True):
        assert a["val/tokens"] == b["val/tokens"]
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)
    a, b = (load_file(runs[e] / "checkpoints/latest/model/model.safetensors") for e in ("single", engine))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_ranks_had_uneven_targets(corpus: Path, store_dir: Path, tmp_path: Path) -> None:
    """The equality above means something: a mean of the ranks' means would have been wrong."""
    from trainway.config.load import load_config
    from trainway.data.loader import Loader
    from trainway.data.prepare import prepare
    from trainway.data.store import TokenStore

    config = load_config(write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))).config
    split = TokenStore.open(prepare(config).store_dir).split("train")
    counts = []
    for rank in range(2):
        loader = Loader(
            split, seq_len=64, global_batch_size=8, micro_batch_size=2, seed=42, packing="documents", shuffle=True,
            rank=rank, world_size=2,
        )  # fmt: skip
        counts.append([loader.step(n).num_targets for n in range(1, 21)])
    assert counts[0] != counts[1]
