"""The quick start: small here; in full, with its promises, under the marker slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import metrics, run_cli
from trainway.recipes.quickstart import write_pairs

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = (
    "total_steps=8",
    "warmup_steps=2",
    "tokenizer.vocab_size=1024",
    "eval.every=4",
    "save_every=4",
    "eval.max_tokens=4096",
    "tune.total_steps=4",
    "tune.warmup_steps=1",
    "tune.eval.every=4",
    "tune.eval.max_tokens=4096",
)


def check_outcome(out: Path, said: str) -> None:
    assert (out / "loss.png").read_bytes().startswith(PNG)
    for run, exported in (("run", "model"), ("tuning", "tuned-model")):
        model = AutoModelForCausalLM.from_pretrained(out / exported)
        tokenizer = AutoTokenizer.from_pretrained(out / exported)
        ids = tokenizer("def main(", return_tensors="pt", add_special_tokens=False)["input_ids"]
        trained = AutoModelForCausalLM.from_pretrained(out / run / "checkpoints/best/model")
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, trained(ids).logits, rtol=0, atol=1e-5)
    for word in ("loss.png", "tuned-model", "trainway generate"):
        assert word in said
    for word in ("before tuning:", "after tuning:", "its docstring:"):
        assert said.count(word) == 3


def test_pairs_are_functions_without_their_docstrings(tmp_path: Path) -> None:
    module = '''
class Point:
    def length(self):
        """The distance
        from the origin.

        Not squared."""
        return (self.x**2 + self.y**2) ** 0.5

    def nothing(self):
        """A docstring alone."""

    def silent(self):
        return 1


async def wait(seconds): "Sleep."; await sleep(seconds)
'''
    modules = tmp_path / "modules.jsonl"
    modules.write_text(json.dumps({"text": module}) + "\n" + json.dumps({"text": "print 'old'"}) + "\n")
    rows = [
        json.loads(line) for line in write_pairs(modules, tmp_path / "pairs.jsonl").read_text().splitlines()
    ]
    assert rows == [
        {
            "prompt": "def length(self):\n    return (self.x**2 + self.y**2) ** 0.5\n\n# What it does:",
            "completion": " The distance from the origin.",
        }
    ]


def test_small_quickstart_interrupted_and_started_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainway", "quickstart", "--out", str(out), *SMALL]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        )
    while process.poll() is None and not (out / "run/metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    done = run_cli("quickstart", "--out", out, *SMALL)
    assert [r["step"] for r in metrics(out / "run")] == list(range(1, 9))
    check_outcome(out, done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_full_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", root / "scripts/quickstart.sh", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr
    start, *_, end = metrics(tmp_path / "out/run", "val/loss")
    assert end["val/loss"] <= 0.5 * start["val/loss"]
    before, *_, after = metrics(tmp_path / "out/tuning", "val/loss")
    assert after["val/loss"] <= 0.85 * before["val/loss"]
    for run, first, last in (("run", start, end), ("tuning", before, after)):
        seconds = json.loads((tmp_path / "out" / run / "report.json").read_text())["seconds"]
        print(f"{run}: {seconds:.0f} s, {first['val/loss']:.3f} -> {last['val/loss']:.3f}")
    check_outcome(tmp_path / "out", done.stdout)
