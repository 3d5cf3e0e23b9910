"""Two `trainway train` commands on one machine, as two nodes: one run, one stop, one clear word when a node is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import metrics, run_cli, stream, tiny, write_config

STEPS = 60
Words = Callable[[int, int], tuple[list[str], dict[str, str]]]
"""(node rank, port) → what the node is told on its command line and by its environment."""


def c10d(rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """No ranks given: the rendezvous gives them out."""
    return ["--", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"], {}


def command_line(rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    words = ["--", "--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", f"127.0.0.1:{port}"]
    return words, {}


def environment(rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """As in an Indexed Job of Kubernetes: no word of torchrun."""
    names = {"NUM_NODES": "2", "JOB_COMPLETION_INDEX": str(rank), "WORLD_SIZE": "2"}
    return [], {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class Node:
    """One launching command; what it says goes into a file."""

    def __init__(self, config: Path, rank: int, words: list[str], environ: dict[str, str]) -> None:
        self.log = config.with_name(f"{config.stem}-node{rank}-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "trainway", "train", str(config), "--nproc", "1", *words]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environ}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=env, stdout=file, stderr=file, start_new_session=True
            )

    def end(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    @property
    def said(self) -> str:
        return self.log.read_text()


def start(config: Path, words: Words) -> list[Node]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Node(config, rank, *words(rank, port)) for rank in range(2)]


def run(config: Path, words: Words) -> list[Node]:
    nodes = start(config, words)
    codes = [node.end() for node in nodes]
    assert codes == [0, 0], [node.said for node in nodes]
    return nodes


def config_file(root: Path, name: str, corpus: Path, store_dir: Path, **more: object) -> Path:
    config = tiny(corpus, store_dir, root / name, total_steps=STEPS)
    config["checkpoint"] = {"save_every": 1000}
    config["eval"] = {"every": 1000, "num_samples": 0}
    return write_config(root / f"{name}.yaml", {**config, **more})


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Path:
    """The run of two processes on one node."""
    root = tmp_path_factory.mktemp("one-node")
    run_cli("train", config_file(root, "run", corpus, store_dir), "--nproc", 2, OMP_NUM_THREADS="1")
    return root / "run"


@pytest.mark.parametrize(
    "words", [c10d, *(pytest.param(w, marks=pytest.mark.slow) for w in (command_line, environment))]
)
def test_two_nodes_train_what_one_node_does(
    one_node: Path, tmp_path: Path, corpus: Path, store_dir: Path, words: Words
) -> None:
    nodes = run(config_file(tmp_path, "run", corpus, store_dir), words)
    assert stream(tmp_path / "run") == stream(one_node)
    for node in nodes:  # the interface was found, and told
        assert "GLOO_SOCKET_IFNAME=lo" in node.said
    assert sum("[RESULT]" in node.said for node in nodes) == 1
    if words is not c10d:
        assert "[RESULT]" in nodes[0].said  # rank 0 is on the node that was told so


@pytest.mark.slow
@pytest.mark.parametrize(("words", "target"), [(c10d, 0), (c10d, 1), (environment, 0), (environment, 1)])
def test_a_stop_of_one_node_stops_both_at_one_step(
    one_node: Path, tmp_path: Path, corpus: Path, store_dir: Path, words: Words, target: int
) -> None:
    config = config_file(tmp_path, "run", corpus, store_dir)
    nodes = start(config, words)
    lines = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 100
    while not lines.exists() or lines.read_bytes().count(b'"samples"') < 8:
        alive = all(node.process.poll() is None for node in nodes)
        assert alive and time.monotonic() < end, [node.said for node in nodes]
        time.sleep(0.005)
    nodes[target].process.send_signal(signal.SIGTERM)
    codes = [node.end() for node in nodes]
    assert codes == [75, 75], [node.said for node in nodes]
    (step,) = (p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert step == f"step-{len(metrics(tmp_path / 'run'))}" != f"step-{STEPS}"
    run(config, words)
    assert stream(tmp_path / "run") == stream(one_node)


@pytest.mark.slow
def test_fsdp_over_two_nodes(one_node: Path, tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    sharded = {"engine": {"name": "fsdp"}}
    run_cli("train", config_file(tmp_path, "one", corpus, store_dir, **sharded), "--nproc", 2)
    run(config_file(tmp_path, "two", corpus, store_dir, **sharded), c10d)
    assert stream(tmp_path / "two") == stream(tmp_path / "one")
    for a, b in zip(metrics(tmp_path / "two")[:20], metrics(one_node)[:20], strict=True):
        assert a["samples"] == b["samples"]
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "rank"),
    [(environment, 0), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((environment, 1), (c10d, 0)))],
)
def test_a_node_that_stays_alone_says_so_in_time(
    tmp_path: Path, corpus: Path, store_dir: Path, words: Words, rank: int
) -> None:
    config = config_file(tmp_path, "run", corpus, store_dir, engine={"timeout_s": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = Node(config, rank, *words(rank, port))
    assert node.end(60) == 4, node.said
    assert "did not find each other at" in node.said and str(port) in node.said
    assert "Traceback" not in node.said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stop_while_waiting_for_the_other_node(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = config_file(tmp_path, "run", corpus, store_dir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = Node(config, 0, *environment(0, port))
    time.sleep(6)  # torchrun is waiting then; should it still be starting, the answer is the same
    node.process.send_signal(signal.SIGTERM)
    assert node.end(30) == 75, node.said
