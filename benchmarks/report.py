"""The report of a long run: how long it takes to write, how large it is, and how long a browser takes to draw it.

python benchmarks/report.py [--steps 400000]     needs playwright and chromium
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from trainway.config.load import dump_config, load_config
from trainway.report.page import write_report

OPENINGS = 5


def make_run(directory: Path, steps: int, *, seed: int = 5) -> Path:
    """A run directory as pretraining leaves it: metrics with the shape of real ones, a validation and samples every
    thousandth of the run."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    config = load_config("m3_medium", {"data.train": ["corpus.jsonl"], "train.total_steps": steps}).config
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "status.json").write_text(json.dumps({"state": "done", "step": steps, "val_loss": 2.4}))
    every, spike = max(1, steps // 1000), 0.0
    with (
        (directory / "metrics.jsonl").open("w") as metrics,
        (directory / "samples.jsonl").open("w") as samples,
    ):
        for step in range(steps + 1):
            trend = 2.3 + 7.2 / (1 + step / (0.004 * steps)) ** 0.6
            if step % every == 0:
                loss = trend + rng.gauss(0.02, 0.004)
                metrics.write(json.dumps({"step": step, **validation(loss)}) + "\n")
                for prompt in range(4):
                    text = " ".join(rng.choice(WORDS) for _ in range(60))
                    samples.write(
                        json.dumps({"step": step, "prompt": f"prompt {prompt}", "text": text}) + "\n"
                    )
            if step:
                spike = 3.0 if rng.random() < 2e-5 else spike * 0.9
                metrics.write(json.dumps(training(rng, step, steps, trend + spike)) + "\n")
    return directory


WORDS = "the a def class return import self value name data list of to in is not and for with from".split()


def validation(loss: float) -> dict[str, float]:
    return {"val/loss": loss, "val/ppl": math.exp(loss), "val/bpb": loss / 2.57, "val/tokens": 1e6}


def training(rng: random.Random, step: int, steps: int, trend: float) -> dict[str, object]:
    speed = 412_000 * (0.6 if rng.random() < 1e-3 else 1) * rng.gauss(1, 0.006)
    return {
        "step": step,
        "samples": f"{rng.getrandbits(64):016x}",
        "train/loss": trend + rng.gauss(0, 0.06),
        "train/z_loss": 1e-4 * rng.random(),
        "optim/grad_norm": math.exp(rng.gauss(-1, 0.3)),
        "optim/lr": 3e-4 * min(1, step / 2000) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "train/tokens": step * 524_288,
        "perf/step_s": 524_288 / speed,
        "perf/tokens_per_s": speed,
        "perf/mfu": speed / 412_000 * 0.43,
        "perf/memory_gib": 71.2345,
        "perf/gpu_utilization": min(1.0, rng.gauss(0.97, 0.02)),
        **{f"data/epoch/source-{i}": step / steps * (i + 1) for i in range(4)},
    }


def open_times(page: Path) -> list[float]:
    """Seconds from asking for the page to the frame after its last chart is drawn, in a fresh window each."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    drawn = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(OPENINGS):
            window = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.perf_counter()
            window.goto(page.as_uri(), wait_until="load")
            window.evaluate(drawn)
            times.append(time.perf_counter() - began)
            charts, empty = window.evaluate(EMPTY)
            assert charts and not empty, (charts, empty)
            window.close()
        browser.close()
    return times


EMPTY = """() => {
  const all = [...document.querySelectorAll("canvas")];
  const empty = all.filter((canvas) => !canvas.getContext("2d")
    .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value));
  return [all.length, empty.length];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as directory:
        run = make_run(Path(directory) / "long", steps)
        began = time.perf_counter()
        written = write_report([run])
        writing = time.perf_counter() - began
        times = open_times(written.path)
        log = (run / "metrics.jsonl").stat().st_size
        print(f"{steps:,} steps, metrics.jsonl {log / 2**20:.0f} MiB")
        print(f"written in {writing:.1f} s, {written.bytes / 1e6:.2f} MB")
        print(
            f"opened with all charts drawn in {statistics.median(times):.2f} s (median of {OPENINGS}, most {max(times):.2f})"
        )


if __name__ == "__main__":
    main()
