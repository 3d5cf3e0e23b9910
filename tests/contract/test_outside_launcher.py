"""Under somebody else's torchrun, on several nodes, the same command trains the same run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import metrics, run_cli, stream, tiny, write_config


@pytest.mark.slow
def test_two_nodes_of_one_rank_equal_one_node_of_two(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    paths = [
        write_config(tmp_path / f"{n}.yaml", tiny(corpus, store_dir, tmp_path / n))
        for n in ("own", "outside")
    ]
    run_cli("train", paths[0], "--nproc", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--master-port={port}",
    ]
    command += ["--master-addr=127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", "-m", "trainway", "train", str(paths[1])],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert stream(tmp_path / "outside") == stream(tmp_path / "own")


def test_epochs_end_with_a_checkpoint_when_asked(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = tiny(corpus, store_dir, tmp_path / "run")
    del config["train"]["total_steps"]
    config["train"] |= {"epochs": 2.0, "global_batch_size": 64, "micro_batch_size": 16}
    config["checkpoint"] = {"save_every": 1000, "save_each_epoch": True}
    done = run_cli("train", write_config(tmp_path / "c.yaml", config))
    steps = [int(p.name[5:]) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.startswith("step-")]
    last = metrics(tmp_path / "run")[-1]["step"]
    assert sorted(steps) == [last // 2, last]
    assert "[EPOCH] epoch 1 ended" in done.stderr and "[EPOCH] epoch 2 ended" in done.stderr
    tokens = metrics(tmp_path / "run")[-1]["train/tokens"]
    assert tokens == pytest.approx(2 * 60_000, rel=0.05)  # each token about once per epoch


def test_debug_log_shows_batches(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = tiny(corpus, store_dir, tmp_path / "run", total_steps=2)
    config["schedule"] = {"warmup_steps": 0}
    path = write_config(tmp_path / "c.yaml", config)
    done = run_cli("train", path, "log.level=debug", "log.batches=first-last")
    assert (
        done.stderr.count("[BATCH]") == done.stderr.count("[COLLATE]") == 4
    )  # 2 of 4 micro-batches, 2 steps
