"""Run directories as a training leaves them, made in a moment: for tests of what looks at runs."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainway.config.load import dump_config
from trainway.config.schema import RunConfig
from trainway.jobs.orders import JobDir
from trainway.run_dir import RunDir

PAYLOADS = ("<script>alert(1)</script>", "$(touch x);'\"", "<img src=x onerror=alert(2)>", "two\nlines")


def settings(**more: Any) -> dict[str, Any]:
    """A small pretraining; sections given are laid over its own."""
    base: dict[str, Any] = {
        "recipe": "pretrain",
        "model": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2048, "max_seq_len": 1024},
        "tokenizer": {"vocab_size": 32000},
        "data": {"train": ["corpus.jsonl"]},
        "train": {"total_steps": 5000, "seq_len": 1024, "global_batch_size": 64, "micro_batch_size": 8},
        "optim": {"lr": 3e-4},
    }  # fmt: skip
    for section, values in more.items():
        base[section] = base[section] | values if isinstance(base.get(section), dict) else values
    return base


def record(
    step: int, *, total: int = 5000, start: float = 10.4, floor: float = 2.9, seed: int = 0
) -> dict[str, Any]:
    """What a step logs."""
    noise = random.Random(seed * 1_000_003 + step)
    loss = floor + (start - floor) * math.exp(-step / (total / 6)) + noise.gauss(0, 0.05)
    warm = min(1.0, step / 200)
    return {
        "step": step,
        "samples": f"{noise.getrandbits(64):016x}",
        "train/loss": loss,
        "optim/grad_norm": 0.4 + 2 * math.exp(-step / 300) + abs(noise.gauss(0, 0.05)),
        "optim/lr": 3e-4 * warm * (0.55 + 0.45 * math.cos(math.pi * step / total)),
        "train/tokens": step * 65536,
        "perf/step_s": 1.18 + noise.gauss(0, 0.02),
        "perf/tokens_per_s": 55_400 + noise.gauss(0, 400),
        "perf/mfu": 0.412 + noise.gauss(0, 0.003),
        "perf/memory_gib": 61.2,
    }


def validation(step: int, *, total: int = 5000, floor: float = 2.9) -> dict[str, Any]:
    """What a validation logs."""
    loss = floor + 0.05 + 7.5 * math.exp(-step / (total / 6))
    return {
        "step": step,
        "val/loss": loss,
        "val/ppl": math.exp(loss),
        "val/bpb": loss / 2.93,
        "val/tokens": 2e6,
    }


def make_run(
    path: Path,
    *,
    state: str | None = "done",
    steps: int = 300,
    every: int = 100,
    seed: int = 0,
    floor: float = 2.9,
    warnings: int = 0,
    gpu: str = "NVIDIA H100 80GB HBM3",
    samples: list[dict[str, Any]] | None = None,
    log: str = "",
    error: str = "",
    **sections: Any,
) -> RunDir:
    """A run of so many steps with a validation every `every` of them, and what stands beside its metrics."""
    run = RunDir(path)
    path.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate(settings(**sections))
    total = config.train.total_steps or 5000
    run.config.write_text(dump_config(config))
    records = []
    for step in range(1, steps + 1):
        records.append(record(step, total=total, floor=floor, seed=seed))
        if step % every == 0:
            records.append(validation(step, total=total, floor=floor))
    run.metrics.write_text("".join(json.dumps(found) + "\n" for found in records))
    stamp = lambda ago: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))  # noqa: E731
    lines = [
        f"{stamp(steps * 1.2)} INFO [MODEL] 912,000,000 FLOPs per token, bf16, peak 989 TFLOP/s per device ({gpu} data sheet, dense bf16)",
        f"{stamp(steps * 1.2)} INFO [DDP] fsdp on 8 process(es), cuda:0",
        *(f"{stamp(90)} WARNING warning: 31,200 tokens/s in the last 20 steps, where 55,400 are usual" for _ in range(warnings)),
        *(f"{stamp((steps - step) * 1.2)} INFO [TRAIN] step {step}/{total}  loss {3:.4f}" for step in range(1, steps + 1, 10)),
    ]  # fmt: skip
    run.log.write_text("\n".join(lines) + "\n" + log)
    run.provenance.write_text(
        json.dumps({"started": stamp(steps * 1.2), "hostname": "node-1", "argv": ["trainway", "train", "run.yaml"],
                    "versions": {"python": "3.11.7", "torch": "2.13.0"}, "git": {"trainway": {"commit": "a" * 40, "dirty": False}}})
    )  # fmt: skip
    if samples:
        run.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    if state is not None:
        found = {"state": state, "step": steps, "time": stamp(0), "val_loss": floor + 0.1}
        run.status.write_text(json.dumps(found | ({"error": error} if error else {})))
    if state == "done":
        run.report.write_text(json.dumps({"steps": steps, "seconds": steps * 1.18, "val_loss": floor + 0.1}))
    if state == "running":
        run.lock.touch()
    return run


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """The run's lock, as the process that trains it holds it."""
    with run.lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def grow(run: RunDir, first: int, last: int, **more: Any) -> None:
    """Append steps."""
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(record(step, **more)) + "\n" for step in range(first, last + 1))


def make_job(root: Path, name: str, run_dir: str, *, per_hour: float = 21.52, **state: Any) -> JobDir:
    """The files of a job on its volume `root`."""
    job = JobDir.of(root, name)
    job.path.mkdir(parents=True)
    orders = {
        "job": name,
        "config": {"run_dir": run_dir},
        "dollars_per_hour": per_hour,
        "limits": {"dollars": 400},
    }
    job.orders.write_text(json.dumps(orders))
    now = time.time()
    found = {
        "job": name,
        "stage": "train",
        "outcome": None,
        "began": now - 7200,
        "updated": now,
        "attempts": 1,
    }
    job.state.write_text(json.dumps(found | {"step": 0, "total_steps": 0, "dollars": per_hour * 2} | state))
    job.config.write_text("recipe: pretrain\n")
    return job


def age(path: Path, seconds: float) -> None:
    """Let a file have been written so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
