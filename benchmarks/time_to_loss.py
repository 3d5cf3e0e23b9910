"""Time to a fixed validation loss: Trainway (AdamW, Muon) against transformers.Trainer and litgpt's pretrain loop.

python benchmarks/time_to_loss.py --out DIR --litgpt-venv DIR [--minutes 5] [--rounds 3] [--sweep] [--smoke]

All arms train one Llama from the same weights on the same rows in the same order (hashes are printed), with the same
tokens per step and cosine schedule, in fp32 on two threads, each in a process of its own, never two at a time. The
validation loss is computed by one function on the same held-out rows. Validation, saving and the peers' export of
weights are off the clock, and so is the first step, in which litgpt compiles its model; it is reported beside.

The number of steps is what the slowest AdamW arm does in --minutes, found by a short trial. The loss to reach is, if not
given, what the slowest AdamW arm of the first round reaches after 80 % of its steps. --sweep chooses the learning rates
by the loss of short runs of Trainway: one for all AdamW arms, one for Muon. --out holds everything: an interrupted
benchmark goes on with the arms that are missing. Without --litgpt-venv (made if it does not exist) litgpt is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from time_to_loss_arms import (
    BETAS,
    DECAY,
    MAX_NORM,
    MIN_LR_RATIO,
    MODEL,
    ROWS,
    SEED,
    SEQ_LEN,
    THREADS,
    VOCAB,
    model_config,
    save_weights,
    validation_loss,
)

ARMS_FILE = str(Path(__file__).with_name("time_to_loss_arms.py"))
LITGPT = "0.5.13"
ARMS = ("trainway-adamw", "trainway-muon", "trainer", "litgpt")
ADAMW_ARMS = ("trainway-adamw", "trainer", "litgpt")
RATES = {"adamw": 2e-3, "muon": 0.01}
SWEEP = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon": (0.01, 0.02, 0.04)}
TRIAL_STEPS = 16
EVALUATIONS = 25
TARGET_SHARE = 0.8
PACKAGES = ("sympy", "torch", "transformers", "numpy", "matplotlib")
"""Where text comes from once the standard library is used up."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of data, runs, result.json and curves.png"
    )
    parser.add_argument("--litgpt-venv", type=Path, help="environment of litgpt; made if it does not exist")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of the slowest AdamW arm")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--target", type=float, help="validation loss to reach, nats per token")
    parser.add_argument("--sweep", action="store_true", help="choose the learning rates by short runs first")
    parser.add_argument("--sweep-steps", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="a small corpus and 24 steps: does it work")
    compare(parser.parse_args())


def compare(options: argparse.Namespace) -> None:
    """Prepares, finds the number of steps, runs every arm in every round, and reports."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if arm != "litgpt" or options.litgpt_venv]
    pythons = dict.fromkeys(arms, sys.executable)
    if options.litgpt_venv:
        pythons["litgpt"] = litgpt_python(options.litgpt_venv)
    describe_machine(pythons)
    corpus_mb, val_tokens = (2, 4096) if options.smoke else (20, 65536)
    spec = prepare_inputs(out, corpus_mb, val_tokens)
    bench = Bench(out, spec, pythons)
    rates = bench.sweep(options.sweep_steps) if options.sweep else dict(RATES)
    steps = 24 if options.smoke else bench.steps_in(options.minutes * 60, rates)
    every = 6 if options.smoke else steps // EVALUATIONS
    plan = {"steps": steps, "every": every, "rates": rates, "warmup": steps // 20}
    print(f"{steps} steps of {ROWS * SEQ_LEN} tokens, {rates}, {options.rounds} round(s)", flush=True)
    rounds = []
    for number in range(options.rounds):
        results = {}
        for arm in arms if number % 2 == 0 else arms[::-1]:
            result = results[arm] = bench.run(f"round{number + 1}-{arm}", arm, plan)
            figures = f"{result['seconds'][-1]:.1f} s, loss {result['points'][-1]['loss']:.4f}"
            print(f"round {number + 1} {arm}: {figures}, load before {result['load']:.1f}", flush=True)
        check_round(results)
        rounds.append(results)
    target = options.target or target_loss(rounds[0])
    report(out, rounds, target, plan | spec)


class Bench:
    """The arms on one set of inputs; a finished arm's result is kept in its directory and not run again."""

    def __init__(self, out: Path, spec: dict[str, Any], pythons: dict[str, str]) -> None:
        self.out, self.spec, self.pythons = out, spec, pythons

    def run(self, name: str, arm: str, plan: dict[str, Any]) -> dict[str, Any]:
        """One arm: seconds at the end of each step, from the end of the first one, and points (step, s, loss)."""
        directory = self.out / "arms" / name
        done = directory / "result.json"
        job = self.spec | plan | {"arm": arm, "rows": str(write_rows(self.out, self.spec, plan["steps"]))}
        if not arm.startswith(
            "trainway"
        ):  # the peers' own schedules begin at a rate of 0, one step behind ours
            from trainway.schedules import lr_factor

            schedule = run_config(job).schedule
            job["rate_factors"] = [lr_factor(schedule, n, job["steps"]) for n in range(1, job["steps"] + 1)]
        if done.exists() and (kept := json.loads(done.read_text()))["job"] == job:
            return kept
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "job.json").write_text(json.dumps(job))
        load = os.getloadavg()[0]
        if arm.startswith("trainway"):
            raw = run_trainway(directory, job)
        else:
            start([self.pythons[arm], ARMS_FILE, arm, str(directory)], directory / "log.txt")
            start([sys.executable, ARMS_FILE, "evaluate", str(directory)], directory / "evaluate.txt")
            raw = json.loads((directory / "raw.json").read_text())
            raw["losses"] = json.loads((directory / "losses.json").read_text())
            shutil.rmtree(directory / "weights")
        first, *_ = raw["ends"]
        seconds = [end - first for end in raw["ends"]]
        points = [
            {"step": int(step), "seconds": 0.0 if step == "0" else seconds[int(step) - 1], "loss": loss}
            for step, loss in raw["losses"].items()
        ]
        result = {
            "job": job, "points": points, "seconds": seconds, "first_step_s": first,
            "first_train_loss": raw["first_train_loss"], "load": load,
        }  # fmt: skip
        done.write_text(json.dumps(result))
        return result

    def steps_in(self, seconds: float, rates: dict[str, float]) -> int:
        """Steps that the slowest AdamW arm does in so many seconds, from a short trial of each."""
        plan = {"steps": TRIAL_STEPS, "every": TRIAL_STEPS, "rates": rates, "warmup": 1}
        speeds = {}
        for arm in ADAMW_ARMS:
            if arm in self.pythons:
                ends = self.run(f"trial-{arm}", arm, plan)["seconds"]
                speeds[arm] = statistics.median(b - a for a, b in pairwise(ends))
        print("trial:", ", ".join(f"{arm} {speed:.3f} s a step" for arm, speed in speeds.items()), flush=True)
        return EVALUATIONS * max(2, int(seconds / max(speeds.values()) / EVALUATIONS))

    def sweep(self, steps: int) -> dict[str, float]:
        """The peak rates of the least validation loss after `steps` steps, by optimiser; all losses are printed."""
        best = dict(RATES)
        for name, candidates in SWEEP.items():
            losses = {}
            for rate in candidates:
                rates = best | {name: rate}
                plan = {"steps": steps, "every": steps, "rates": rates, "warmup": steps // 20}
                found = self.run(f"sweep-{name}-{rate:g}", f"trainway-{name}", plan)
                losses[rate] = found["points"][-1]["loss"]
            best[name] = min(losses, key=lambda rate: losses[rate])
            print(f"sweep {name}, {steps} steps:", {k: round(v, 4) for k, v in losses.items()}, flush=True)
        return best


def describe_machine(pythons: dict[str, str]) -> None:
    packages = {name: version(name) for name in ("trainway", "torch", "transformers", "accelerate")}
    if "litgpt" in pythons:
        code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('litgpt', 'lightning', 'torch')))"
        found = subprocess.run([pythons["litgpt"], "-c", code], check=True, capture_output=True, text=True)
        packages["litgpt's environment"] = found.stdout.strip()
    print(f"{os.cpu_count()} cores, {THREADS} threads, load {os.getloadavg()[0]:.1f}, {packages}", flush=True)
    if os.getloadavg()[0] > 0.5:
        print("WARNING: this machine is busy: the figures will not be worth much", flush=True)


def litgpt_python(directory: Path) -> str:
    """The interpreter of litgpt's own environment; the same torch as here, so that pip takes the same build."""
    python = directory / "bin" / "python"
    if not (directory / "installed").exists():
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        for packages in ([torch], [torch, f"litgpt=={LITGPT}"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (directory / "installed").touch()
    return str(python)


def start(command: list[str], log: Path) -> None:
    """Run a process to its end with its output in `log`."""
    threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        done = subprocess.run(command, env=os.environ | threads, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{log.read_text()[-3000:]}")


# Inputs: one corpus, tokenizer, store, set of first weights and order of rows for all arms


def prepare_inputs(out: Path, corpus_mb: int, val_tokens: int) -> dict[str, Any]:
    """Write what the arms share; the part of an arm's job that is the same for all."""
    from trainway.data.prepare import prepare
    from trainway.data.store import TokenStore
    from trainway.models.load import build_model

    corpus = out / f"corpus-{corpus_mb}.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(documents(corpus_mb * 10**6)))
    spec: dict[str, Any] = {"corpus": str(corpus), "store_dir": str(out / "cache"), "val_tokens": val_tokens}
    prepared = prepare(
        run_config(spec | {"arm": "trainway-adamw", "steps": 1, "every": 1, "rates": RATES, "warmup": 0})
    )
    store = TokenStore.open(prepared.store_dir)
    weights = out / "init.safetensors"
    model = build_model(model_config(), VOCAB, seed=SEED)
    save_weights(weights, model.state_dict())
    spec |= {"store": str(prepared.store_dir), "weights": str(weights)}
    parameters = sum(p.numel() for p in model.parameters())
    train, val = store.split("train"), store.split("val")
    print(
        f"corpus of {corpus.read_bytes().count(10):,} modules: {corpus.stat().st_size / 1e6:.1f} MB, sha256 {digest(corpus)}"
    )
    print(f"{train.num_tokens:,} tokens to train on, {val.num_tokens:,} held out, vocabulary {VOCAB}")
    print(f"model: {parameters:,} parameters, first weights sha256 {digest(weights)}", flush=True)
    return spec


def documents(num_bytes: int) -> Iterator[str]:
    """Python sources as JSON records, the standard library's first, in order of their paths, until there are enough."""
    import sysconfig

    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    packages = Path(sysconfig.get_path("purelib"))
    seen: set[bytes] = set()
    written = 0
    for root in (Path(sysconfig.get_path("stdlib")), *(packages / name for name in PACKAGES)):
        for source in sorted(root.rglob("*.py")):
            if left_out.intersection(source.relative_to(root).parts):
                continue
            try:
                text = source.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            key = hashlib.sha256(text.encode()).digest()
            if key in seen or not text.strip() or "\0" in text:
                continue
            seen.add(key)
            written += len(text.encode())
            yield json.dumps({"text": text}, ensure_ascii=False) + "\n"
            if written >= num_bytes:
                return


def write_rows(out: Path, spec: dict[str, Any], steps: int) -> Path:
    """The rows of the steps in the order in which Trainway's loader deals them, [steps * ROWS, SEQ_LEN + 1] int32."""
    import numpy as np

    from trainway.data.loader import Loader
    from trainway.data.store import TokenStore

    path = out / f"rows-{steps}.npy"
    if not path.exists():
        split = TokenStore.open(Path(spec["store"]), verify=False).split("train")
        loader = Loader(
            split, seq_len=SEQ_LEN, global_batch_size=ROWS, micro_batch_size=ROWS, seed=SEED, packing="concat",
            shuffle=True,
        )  # fmt: skip
        batches = [loader.step(step).micro_batches[0] for step in range(1, steps + 1)]
        rows = [np.concatenate([b.input_ids.numpy(), b.labels[:, -1:].numpy()], axis=1) for b in batches]
        np.save(path, np.concatenate(rows).astype(np.int32))
    return path


def run_config(job: dict[str, Any]) -> Any:
    """The configuration of a Trainway arm."""
    from trainway.config.schema import RunConfig

    muon = job["arm"] == "trainway-muon"
    rates = job["rates"]
    return RunConfig.model_validate(
        {
            "run_dir": job.get("run_dir"),
            "seed": SEED,
            "model": MODEL,
            "tokenizer": {"vocab_size": VOCAB},
            "data": {
                "train": [job["corpus"]], "val_ratio": 0.05, "store_dir": job["store_dir"], "packing": "concat",
            },
            "train": {
                "total_steps": job["steps"], "seq_len": SEQ_LEN, "micro_batch_size": ROWS, "precision": "fp32",
                "max_grad_norm": MAX_NORM, "num_threads": THREADS,
            },
            "optim": {
                "name": "muon" if muon else "adamw", "lr": rates["adamw"], "betas": BETAS, "weight_decay": DECAY,
                "muon_lr": rates["muon"],
            },
            "schedule": {"name": "cosine", "warmup_steps": job["warmup"], "min_lr_ratio": MIN_LR_RATIO},
            "checkpoint": {"save_every": job["steps"]},
            "eval": {"every": job["every"], "max_tokens": job["val_tokens"], "num_samples": 0},
            "log": {"every": 100},
        }
    )  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def run_trainway(directory: Path, job: dict[str, Any]) -> dict[str, Any]:
    """`trainway train` as a user starts it; its metrics hold each step's seconds without validation and saving."""
    from trainway.config.resolved import dump_config
    from trainway.tracking.jsonl import read_jsonl

    run = directory / "run"
    config = directory / "config.yaml"
    config.write_text(dump_config(run_config(job | {"run_dir": str(run)})))
    start([sys.executable, "-m", "trainway", "train", str(config)], directory / "log.txt")
    records = list(read_jsonl(run / "metrics.jsonl"))
    steps = [record for record in records if "perf/step_s" in record]
    ends, total = [], 0.0
    for record in steps:
        total += record["perf/step_s"]
        ends.append(total)
    losses = {str(r["step"]): r["val/loss"] for r in records if "val/loss" in r}
    final = run / "checkpoints" / "latest" / "model" / "model.safetensors"
    check = validation_loss(final, job)
    if abs(check - losses[str(job["steps"])]) > 1e-5:
        raise SystemExit(f"VOID: the run logged {losses[str(job['steps'])]}, its weights give {check}")
    shutil.rmtree(run / "checkpoints")
    return {"ends": ends, "losses": losses, "first_train_loss": steps[0]["train/loss"]}


# The result


def check_round(results: dict[str, dict[str, Any]]) -> None:
    """End the benchmark when the arms did not begin from the same weights, rows and loss."""
    starts = {arm: result["points"][0]["loss"] for arm, result in results.items()}
    firsts = {arm: result["first_train_loss"] for arm, result in results.items()}
    for what, values in (("validation loss before training", starts), ("loss of the first step", firsts)):
        if max(values.values()) - min(values.values()) > 1e-4:
            raise SystemExit(f"VOID: the arms differ in the {what}: {values}")
    finals = [results[arm]["points"][-1]["loss"] for arm in ADAMW_ARMS if arm in results]
    first, last = (max(values) - min(values) for values in (firsts.values(), finals))
    print(
        f"first losses equal to {first:.1e}, last validation losses of the AdamW arms to {last:.4f}",
        flush=True,
    )
    if last > 0.05:
        raise SystemExit("VOID: the AdamW arms did not learn the same")


def target_loss(results: dict[str, dict[str, Any]]) -> float:
    """What the slowest AdamW arm reaches after TARGET_SHARE of its steps, between two of its points."""
    slowest = max((results[a] for a in ADAMW_ARMS if a in results), key=lambda result: result["seconds"][-1])
    step = TARGET_SHARE * len(slowest["seconds"])
    for a, b in pairwise(slowest["points"]):
        if a["step"] <= step <= b["step"]:
            return a["loss"] + (b["loss"] - a["loss"]) * (step - a["step"]) / (b["step"] - a["step"])
    return slowest["points"][-1]["loss"]


def time_to(result: dict[str, Any], target: float) -> dict[str, float] | None:
    """Seconds and step at which an arm first reaches the loss, interpolated between two points; None if never."""
    points = result["points"]
    for a, b in pairwise(points):
        if b["loss"] <= target:
            share = (a["loss"] - target) / (a["loss"] - b["loss"]) if a["loss"] > target else 0.0
            return {key: a[key] + share * (b[key] - a[key]) for key in ("seconds", "step")}
    return None


def report(out: Path, rounds: list[dict[str, Any]], target: float, settings: dict[str, Any]) -> None:
    """Print the table, write result.json and curves.png."""
    print(f"\nvalidation loss {target:.4f}; medians of {len(rounds)} round(s), 95 % interval of the ratios")
    table = [summary(arm, rounds, target) for arm in ARMS if arm in rounds[0]]
    for row in table:
        reached = f"{row['seconds']:.1f} s, step {row['step']:.0f}" if row["seconds"] else "never reached"
        print(
            f"{row['arm']}: {reached}; {row['tokens_per_s']:,.0f} tokens/s, last loss {row['last_loss']:.4f}, ",
            end="",
        )
        print(f"first step {row['first_step_s']:.1f} s")
        for ours, (median, low, high) in row["ratios"].items():
            print(f"    {median:.2f} [{low:.2f}, {high:.2f}] times the seconds of {ours}")
    result = {"target": target, "settings": settings, "table": table, "rounds": rounds}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    draw(out / "curves.png", rounds, target)
    print(f"curves: {out / 'result.json'}, {out / 'curves.png'}")


def summary(arm: str, rounds: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """One arm's medians over the rounds, and how many times longer than Trainway's arms it took, round by round."""
    results = [results[arm] for results in rounds]
    hits = [time_to(result, target) for result in results]
    speed = statistics.median((len(result["seconds"]) - 1) / result["seconds"][-1] for result in results)
    ratios = {}
    for ours in ("trainway-adamw", "trainway-muon") if not arm.startswith("trainway") else ():
        pairs = [(hit, time_to(results[ours], target)) for hit, results in zip(hits, rounds, strict=True)]
        paired = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs if theirs and mine]
        if len(paired) == len(rounds):
            ratios[ours] = (statistics.median(paired), *interval(paired))
    return {
        "arm": arm,
        "seconds": statistics.median(hit["seconds"] for hit in hits if hit) if all(hits) else None,
        "step": statistics.median(hit["step"] for hit in hits if hit) if all(hits) else None,
        "tokens_per_s": ROWS * SEQ_LEN * speed,
        "last_loss": statistics.median(result["points"][-1]["loss"] for result in results),
        "first_step_s": statistics.median(result["first_step_s"] for result in results),
        "ratios": ratios,
    }


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[9749]


def draw(path: Path, rounds: list[dict[str, Any]], target: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for index, arm in enumerate(rounds[0]):
        for number, results in enumerate(rounds):
            points = results[arm]["points"][1:]
            axes.plot(
                [p["seconds"] for p in points], [p["loss"] for p in points], color=f"C{index}",
                label=arm if number == 0 else None,
            )  # fmt: skip
    axes.axhline(target, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
