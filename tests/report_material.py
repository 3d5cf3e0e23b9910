"""Run directories for reports: small ones as training leaves them, with words that try to break out of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainway.config.load import dump_config, load_config

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=2>\"'&\u2028{{7*7}}\nline two"
GIB = 2**30


def make_run(directory: Path, *, steps: int = 40, loss: float = 3.0, **settings: Any) -> Path:
    """A finished pretraining whose validation loss falls to `loss`; `settings` are of its configuration."""
    given = {"data.train": ["corpus.jsonl"], "train.total_steps": steps, **settings}
    config = load_config("cpu_small", given).config
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump_config(config))
    write_json(directory / "status.json", state="done", step=steps, val_loss=loss)
    figures = {"steps": steps, "tokens": steps * 2048, "seconds": 90.0, "tokens_per_s": steps * 2048 / 90}
    figures |= {
        "val_loss": loss,
        "best_val_loss": loss - 0.25,
        "best_step": steps // 2,
        "parameters": 4_229_568,
    }
    write_json(
        directory / "report.json", **figures, world_size=1, device="cpu", skipped_steps=0, peak_memory_gib=1.5
    )
    write_json(directory / "provenance.json", **PROVENANCE)
    write_json(directory / "start.json", **START, total_steps=steps)
    write_lines(directory / "metrics.jsonl", metrics(steps, loss))
    write_lines(directory / "samples.jsonl", samples(steps))
    (directory / "log.txt").write_text(LOG)
    return directory


def metrics(steps: int, loss: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step % 10 == 0:
            value = loss + 6 * (1 - step / steps)
            found.append({"step": step, "val/loss": value, "val/ppl": 2.0**value, "val/bpb": value / 2.5})
        if step:
            train = {"train/loss": loss + 6 * (1 - step / steps) + step % 3 / 10, "train/tokens": 2048 * step}
            speed = {
                "perf/tokens_per_s": 900.0 + step,
                "perf/step_s": 2.2,
                "perf/mfu": 0.31,
                "perf/memory_gib": 1.5,
            }
            found.append(
                {"step": step, **train, "optim/lr": step / 1e4, "optim/grad_norm": 1 + step % 5, **speed}
            )
    return found  # fmt: skip


def samples(steps: int) -> list[dict[str, Any]]:
    asked = ("def main(", HOSTILE)
    return [
        {"step": step, "prompt": prompt, "text": f"answer of step {step} {HOSTILE}"}
        for step in (0, steps // 2, steps)
        for prompt in asked
    ]


def write_json(path: Path, **value: Any) -> None:
    path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


PROVENANCE = {
    "started": "2026-11-22T04:57:37+00:00",
    "config_hash": "0c336ba34bf450f35daed0f793386502",
    "argv": ["trainway", "train", "cpu_small", f"name={HOSTILE}"],
    "git": {"trainway": {"commit": "84bb02a2bc33", "dirty": True}, "project": None},
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "cpu": {"model": "A <fast> CPU", "cores": 2},
}
START = {
    "origins": {"train.total_steps": "command line", "data.train": f"{HOSTILE}:3", "optim.lr": "preset cpu_small", "seed": "default"},
    "device": "cpu",
    "world_size": 1,
    "data": {
        "splits": {"train": {"documents": 694, "tokens": 1_430_000, "text_bytes": 6_500_000}, "val": {"documents": 37, "tokens": 70_000, "text_bytes": 300_000}},
        "rows_per_epoch": 5585,
        "vocab_size": 8192,
        "quarantined": 3,
        "duplicates": 0,
        "mix": [{"name": "books <b>", "share": 0.75}, {"name": "code", "share": 0.25}],
        "streams": [{"name": "books <b>", "documents": 500, "tokens": 1_000_000, "text_bytes": 4_000_000}],
    },
    "plan": {
        "memory": [{"name": "weights", "bytes": 3 * GIB}, {"name": "activations", "bytes": GIB}],
        "device_bytes": 8 * GIB,
        "counted_bytes": 2 * GIB,
        "hours": 0.05,
        "dollars": 0.4,
        "usd_per_hour": 8.0,
    },
}  # fmt: skip
LOG = """2026-11-22T04:57:38Z INFO [TRAIN] step 1/40  loss 9.0
2026-11-22T04:58:00Z WARNING warning: step 7 left out: the loss is 41.2 (1 so far)
2026-11-22T04:59:00Z WARNING warning: the disk <b>fills</b>
2026-11-22T05:00:00Z WARNING warning: the disk <b>fills</b>
2026-11-22T05:01:00Z ERROR error: it stands still
"""
