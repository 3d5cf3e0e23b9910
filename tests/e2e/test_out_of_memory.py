"""A run that does not fit says what would make it fit, and then it does: real runs under a limit of the process's memory."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny, write_config
from trainway.config.load import load_config
from trainway.data.prepare import prepare
from trainway.errors import ExitCode

MIB = 2**20
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
"""What is freed leaves the process, so that its peak is what the run holds and not what glibc keeps."""
_DATA = (
    "import trainway.launch.local, trainway.recipes.supervised, resource;"
    "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmData')))"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Path:
    """A small model and many tokens: 8,192 in the only micro-batch of a step, of which autograd keeps 0.8 GiB."""
    root = tmp_path_factory.mktemp("oom")
    settings = tiny(corpus, store_dir, root / "run", total_steps=2, seq_len=512)
    settings["model"] = {
        "hidden_size": 192, "num_layers": 8, "num_heads": 3, "intermediate_size": 512, "max_seq_len": 512
    }  # fmt: skip
    settings["train"] |= {"micro_batch_size": 16, "global_batch_size": 16, "precision": "fp32"}  # type: ignore[operator]
    settings["eval"] = {"every": 10, "num_samples": 0, "max_tokens": 1024}
    settings["schedule"] = {"warmup_steps": 0}
    path = write_config(root / "config.yaml", settings)
    prepare(load_config(path).config)  # not under the limit
    return path


def train(
    config: Path, name: str, words: list[str], limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """`trainway train` with `words`, and no more than `limit` bytes of data."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-m", "trainway", "train", str(config), *words]
    command += [f"run_dir={config.parent / name}", "--resume", "never"]
    environment = {**os.environ, **RETURNING, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, preexec_fn=limited, capture_output=True, text=True)


def peak(config: Path, name: str) -> float:
    return float(json.loads((config.parent / name / "report.json").read_text())["peak_memory_gib"])


def advice(stderr: str) -> list[tuple[list[str], float]]:
    """The changes that the message names, each as settings, and the GiB that it says they save."""
    found = re.findall(r"((?:[\w.]+=\w+ )+)saves ([\d.]+) GiB", stderr)
    return [(change.split(), float(saves)) for change, saves in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's data")
def test_the_first_change_makes_it_fit_and_savings_are_true(config: Path) -> None:
    imports = subprocess.run(
        [sys.executable, "-c", _DATA], env={**os.environ, **RETURNING}, capture_output=True, text=True
    )
    limit = int(imports.stdout) * 1024 + 600 * MIB  # of the 0.9 GiB that the run needs
    failed = train(config, "failed", [], limit)
    assert failed.returncode == ExitCode.ENVIRONMENT, failed.stderr
    assert "the machine's memory is full, asked for" in failed.stderr
    assert "Traceback" not in failed.stderr
    changes = advice(failed.stderr)
    assert len(changes) >= 3 and [saves for _, saves in changes] == sorted(
        (saves for _, saves in changes), reverse=True
    )
    first, _ = changes[0]
    fitting = train(config, "fitting", first, limit)
    assert fitting.returncode == 0, fitting.stderr

    assert train(config, "whole", []).returncode == 0
    rows = next(change for change in changes if change[0][0].startswith("train.micro_batch_size"))
    for name, (words, saves) in {"fitting": changes[0], "rows": rows}.items():
        if name != "fitting":
            assert train(config, name, words).returncode == 0
        assert peak(config, "whole") - peak(config, name) == pytest.approx(saves, rel=0.1), words
