"""What `trainway bench` forecasts against what the run then takes: bench, run, bench, on the same machine.

python benchmarks/forecast.py [--clock wall|cpu] [--case pretrain|lora|all] [--rounds 1] [--steps 200] [--bench-steps 20]

Every arm is a process of its own. A run trains, evaluates, samples and saves as its configuration says. Two figures are
compared: the training alone, from the first evaluation until the run says that it is done, and the whole command, start and
end included. The error of a forecast is forecast / run - 1; before and after the run there is one each, and their distance says how
much of the error is the machine's own unrest. With --clock cpu both sides are timed by the CPU time of their process: on a
machine that others use as well, seconds say how much of it was left, and nothing of the forecast.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CASES = ("pretrain", "lora")
CORPUS_BYTES = 1 << 20
MARK = "mark:"


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        sys.exit(run_arm(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--case", choices=(*CASES, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bench-steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES if options.case == "all" else (options.case,):
            config = make_config(Path(scratch), case, options.steps)
            arm("wall", "prepare", config)
            compare(case, config, options)


def compare(case: str, config: Path, options: argparse.Namespace) -> None:
    """Rounds of bench, run, bench; the errors of each forecast and their medians."""
    figures = {"training": "training_s"} | ({"whole command": "seconds"} if options.clock == "wall" else {})
    errors: dict[str, list[float]] = {name: [] for name in figures}
    for number in range(options.rounds):
        before = bench(config, options)
        run = train(config, options)
        after = bench(config, options)
        for name, key in figures.items():
            found = [forecast[key] / run[key] - 1 for forecast in (before, after)]
            errors[name] += found
            print(
                f"{case} round {number + 1} {name}: run {run[key]:.1f} s, forecasts {before[key]:.1f} and "
                f"{after[key]:.1f} s: {found[0]:+.1%} and {found[1]:+.1%}",
                flush=True,
            )
        for what, forecast in (("forecast", before), ("forecast", after), ("run", run)):
            rest = forecast["training_s"] - forecast["steps_s"]
            print(
                f"  {what}: steps {forecast['steps_s']:.1f} s, evaluations and saves {rest:.1f} s", flush=True
            )
    for name, found in errors.items():
        middle = statistics.median(found)
        print(
            f"{case} {name}: median error {middle:+.1%}, from {min(found):+.1%} to {max(found):+.1%}",
            flush=True,
        )


def bench(config: Path, options: argparse.Namespace) -> dict[str, Any]:
    words = ["--steps", str(options.bench_steps), "--nproc", "1", "--json", "--no-record"]
    done = arm(options.clock, "bench", config, *words)
    forecast: dict[str, Any] = json.loads(done.stdout)["forecast"]
    return forecast


def train(config: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run it whole; seconds of its training, of the steps in it, and of the command."""
    run_dir = Path(json.loads(config.read_text())["run_dir"])
    shutil.rmtree(run_dir, ignore_errors=True)
    began = time.perf_counter()
    done = arm(options.clock, "train", config, "--nproc", "1")
    seconds = time.perf_counter() - began
    marks = {
        line.split()[1]: float(line.split()[2]) for line in done.stderr.splitlines() if line.startswith(MARK)
    }
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["perf/step_s"] for record in records if "perf/step_s" in record]
    return {"training_s": marks["[DONE]"] - marks["[STEP]"], "seconds": seconds, "steps_s": sum(steps)}


def arm(clock: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--arm", clock, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def run_arm(clock: str, words: list[str]) -> int:
    """The command line in this process; says when the training begins and ends, by the clock that it goes by."""
    if clock == "cpu":
        time.perf_counter = time.process_time
    from trainway.cli.app import main as trainway
    from trainway.logs import logger

    def note(record: logging.LogRecord) -> bool:
        if (tag := record.getMessage().split(" ", 1)[0]) in ("[STEP]", "[DONE]"):
            print(MARK, tag, time.perf_counter(), file=sys.stderr)
        return True

    logger.addFilter(note)
    return trainway(words)


def make_config(root: Path, case: str, steps: int) -> Path:
    """A configuration with a few evaluations and saves, and its material."""
    os.environ["TRAINWAY_HOME"] = str(root / "home")
    shared: dict[str, Any] = {
        "run_dir": str(root / case),
        "train": {
            "total_steps": steps,
            "seq_len": 128,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "num_threads": 1,
        },
        "schedule": {"warmup_steps": steps // 10},
        "checkpoint": {"save_every": steps // 2},
        "eval": {"every": steps // 4, "max_tokens": 8192, "num_samples": 2, "max_new_tokens": 16},
    }
    if case == "pretrain":
        write_corpus(root / "corpus.jsonl")
        model = {
            "hidden_size": 192,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 512,
            "max_seq_len": 256,
        }
        data = {"train": [str(root / "corpus.jsonl")], "val_ratio": 0.03, "store_dir": str(root / "stores")}
        shared |= {"recipe": "pretrain", "model": model, "data": data, "tokenizer": {"vocab_size": 2048}}
    else:
        from tests.sft_material import conversations, llama, tokenizer

        base = root / "base"
        llama(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
        ).save_pretrained(base)
        tokenizer().save_pretrained(base)
        chats = conversations(root / "chats.jsonl", rows=3000)
        data = {"train": [str(chats)], "val_ratio": 0.05, "store_dir": str(root / "stores")}
        lora = {"r": 8, "target_modules": ["all-linear"]}
        shared |= {"recipe": "sft", "model": {"path": str(base)}, "data": data, "lora": lora}
    path = root / f"{case}.json"
    path.write_text(json.dumps(shared))
    return path.rename(path.with_suffix(".yaml"))  # JSON is YAML


def write_corpus(path: Path) -> None:
    """The first megabytes of the Python standard library, a file a document."""
    left = CORPUS_BYTES
    with path.open("w") as out:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
            if text.strip() and left > 0:
                out.write(json.dumps({"text": text}) + "\n")
                left -= len(text)


if __name__ == "__main__":
    main()
