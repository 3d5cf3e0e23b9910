"""Shared material: a small real-looking corpus, a tiny model's config, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.forked import fork
from trainway.data.turns import turn

WORDS = "the a def class return import self value name data list of to in is not and for with from".split()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where measurements are kept: those of tests say nothing of this machine."""
    path = shared(tmp_path_factory, "home")
    os.environ["TRAINWAY_HOME"] = str(path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of very different lengths, so that ranks get uneven numbers of targets."""
    path = shared(tmp_path_factory, "corpus") / "train.jsonl"
    return once(path, lambda: write_corpus(path))


def write_corpus(path: Path) -> None:
    rng = random.Random(7)
    with path.open("w") as file:
        for i in range(400):
            words = [
                rng.choice(WORDS) + rng.choice(["", "s", "_" + str(rng.randrange(99))])
                for _ in range(rng.randrange(3, 160))
            ]
            file.write(json.dumps({"text": f"document {i}: " + " ".join(words)}) + "\n")


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "stores")


def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory that is the same in every worker of this run of the suite."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    return directory


def once(path: Path, make: Callable[[], object]) -> Path:
    """`path`, which `make` makes for the first test of any worker that asks for it."""
    made = path.with_name(f"{path.name}.made")
    with turn(path.with_name(f"{path.name}.lock")):
        if not made.exists():
            make()
            made.touch()
    return path


def tiny(corpus: Path, store_dir: Path, run_dir: Path, **train: object) -> dict[str, object]:
    """A config whose run takes seconds: 2 layers of 32, rows of 64 tokens."""
    return {
        "recipe": "pretrain",
        "run_dir": str(run_dir),
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 64,
            "max_seq_len": 64,
        },
        "tokenizer": {"vocab_size": 384},
        "data": {"train": [str(corpus)], "val_ratio": 0.05, "store_dir": str(store_dir)},
        "train": {
            "total_steps": 20,
            "seq_len": 64,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "num_threads": 1,
            **train,
        },
        "optim": {"lr": 3e-3},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"save_every": 10},
        "eval": {"every": 10, "max_new_tokens": 8, "num_samples": 1},
    }


def write_config(path: Path, config: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def run_cli(
    *arguments: object, timeout: float = 300, check: int | None = 0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `trainway` as a user would; `check` is the exit code it must end with."""
    words = list(map(str, arguments))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ}
    if child := fork("trainway", words, env):
        code = child.wait(timeout)
        done = subprocess.CompletedProcess(words, code, child.out.read_text(), child.err.read_text())
    else:
        command = [sys.executable, "-m", "trainway", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def launch(config: Path, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start `trainway train` in a session of its own; what it prints goes to launch.log beside the config."""
    command = [sys.executable, "-m", "trainway", "train", str(config), *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ}
    log = (config.parent / "launch.log").open("ab")
    return subprocess.Popen(command, start_new_session=True, env=env, stdout=log, stderr=log)


def launch_ranks(module: str, jobs: Sequence[tuple[object, ...]], nproc: int) -> None:
    """Run `python -m module JOBS` on `nproc` ranks without torchrun, and see them end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(nproc):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if nproc > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
            env |= {"LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start_module(module, json.dumps(jobs), env))
    for finished in ranks:
        code, said = finished(300)
        assert code == 0, said


def start_module(module: str, argument: str, env: Mapping[str, str]) -> Callable[[float], tuple[int, str]]:
    """Run `python -m module ARGUMENT`; a function that waits for it so many seconds: its exit code and its stderr."""
    if child := fork(module, [argument], env):
        return lambda seconds: (child.wait(seconds), child.err.read_text())
    process = subprocess.Popen(
        [sys.executable, "-m", module, argument], env=env, stderr=subprocess.PIPE, text=True
    )

    def wait(seconds: float) -> tuple[int, str]:
        _, said = process.communicate(timeout=seconds)
        return process.returncode, said

    return wait


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a launch with all its ranks, none of which may outlive it."""
    import psutil

    assert process.poll() is None, "the run was over before it was killed"
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in tree:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=30)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


def metrics(run_dir: Path, key: str = "train/loss") -> list[dict[str, object]]:
    """The records of metrics.jsonl that hold `key`; a line that a living run is still writing is none yet."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def stream(run_dir: Path) -> list[tuple[object, ...]]:
    """What must be bit-identical after any interruption."""
    return [(r["step"], r["samples"], r["train/loss"], r["optim/grad_norm"]) for r in metrics(run_dir)]
