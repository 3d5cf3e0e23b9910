"""How long training waits for a save, at once and asynchronous, and how much memory a rank of fsdp needs.

    python benchmarks/checkpoints.py            # a model of 200M parameters; about 10 GB of memory and of disk

The stall is the time in which the training thread can do nothing else: the whole of a save at once; of an asynchronous
one the time in `save` and the wait for the copy before the weights change. Arms alternate in one process. Before that the
same model is trained by the command line on one process and on two ranks of fsdp, and the peaks are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from trainway.checkpoint.state import TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import read_model_state
from trainway.config.schema import EngineConfig, ModelConfig, OptimConfig
from trainway.engines.single import SingleLearner
from trainway.engines.world import open_world
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.load import build_model
from trainway.training.saving import Saver

VOCAB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--layers", type=int, default=16, help="of 12.8M parameters each")
    parser.add_argument(
        "--dir", type=Path, help="where to write; empty means the system's temporary directory"
    )
    arguments = parser.parse_args()
    model = ModelConfig(
        hidden_size=1024,
        num_layers=arguments.layers,
        num_heads=16,
        intermediate_size=2816,
        vocab_size=VOCAB,
        max_seq_len=256,
    )
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        measure_memory(model, Path(directory))
        if not arguments.memory_only:
            measure_stall(model, Path(directory), arguments.rounds)


def measure_stall(model: ModelConfig, directory: Path, rounds: int) -> None:
    with open_world(EngineConfig()) as world:
        built = build_model(model, VOCAB, seed=0)
        module = CausalLMLoss(built)
        learner = SingleLearner(module, built, OptimConfig(), world, "fp32")
        ids = torch.randint(0, VOCAB, (1, 256))
        savers = {
            name: Saver(
                world,
                learner,
                CheckpointStore(directory / name, 1),
                None,
                name == "async",
                lambda state: None,
            )  # type: ignore[arg-type]
            for name in ("sync", "async")
        }

        def step(saver: Saver) -> float:
            started = time.perf_counter()
            with learner.micro_step(sync=True):
                learner.backward(module(ids, ids), scale=1 / ids.numel())
            saver.before_update()
            learner.step(1e-3, 1.0, lambda norm: True)
            saver.advance(*saver.progress())
            return time.perf_counter() - started

        count = sum(p.numel() for p in built.parameters())
        usual = [step(savers["sync"]) for _ in range(4)][1:]
        stalls: dict[str, list[float]] = {"sync": [], "async": []}
        writing: list[float] = []
        for number in range(rounds + 1):
            for name, saver in savers.items():
                before, state = saver.stalled_s, _state(number)
                expected = {key: value.detach().clone() for key, value in built.state_dict().items()}
                saver.save(state)
                while saver.progress()[0] or saver._pending is not None:
                    writing.append(step(saver))
                stalls[name].append(saver.stalled_s - before)
                found = read_model_state(directory / name / f"step-{number}/model")
                assert all(torch.equal(found[key], expected[key]) for key in found), (
                    "not the weights of its step"
                )
                usual.append(step(saver))
        ratios = [a / s for a, s in zip(stalls["async"][1:], stalls["sync"][1:], strict=True)]
        print(
            f"{count / 1e6:.0f}M parameters, {3 * 4 * count / 1e9:.2f} GB a checkpoint, {rounds} rounds after one to warm up"
        )
        for name, seconds in stalls.items():
            print(
                f"  {name:5}  stall {statistics.median(seconds[1:]):.3f} s  (first save {seconds[0]:.3f} s)"
            )
        print(
            f"  async / sync: {statistics.median(ratios):.3f} (each: {', '.join(f'{r:.3f}' for r in ratios)})"
        )
        print(
            f"  a step: {statistics.median(usual):.2f} s, {statistics.median(writing):.2f} s while files are written"
        )
        print("  every checkpoint equals the weights of its step, bit for bit")


def measure_memory(model: ModelConfig, directory: Path) -> None:
    corpus = directory / "corpus.txt"
    corpus.write_text("\n\n".join(f"document {n} " + "some words of text " * 20 for n in range(2000)))
    config = {
        "model": {**model.model_dump(exclude_none=True), "vocab_size": VOCAB},
        "tokenizer": {"vocab_size": 512},
        "data": {"train": [str(corpus)], "text_unit": "paragraph", "store_dir": str(directory / "cache")},
        "train": {
            "total_steps": 3,
            "seq_len": 64,
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "num_threads": 1,
        },
        "schedule": {"warmup_steps": 1},
        "eval": {"num_samples": 0, "max_tokens": 256},
    }
    peaks = {}
    for name, words in {"single": ["--nproc", "1"], "fsdp": ["--nproc", "2", "engine.name=fsdp"]}.items():
        run = directory / f"run-{name}"
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "run_dir": str(run)}))
        command = [sys.executable, "-m", "trainway", "train", str(path), *words]
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        peaks[name] = json.loads((run / "report.json").read_text())["peak_memory_gib"]
        print(
            f"  {name:6} peak of a rank {peaks[name]:.2f} GiB (resident, the interpreter and libraries included)"
        )
    print(f"  fsdp x 2 / single: {peaks['fsdp'] / peaks['single']:.3f}")


def _state(step: int) -> TrainState:
    return TrainState(step, 0, 0, None, None, None, 0, {}, {}, 0.0, "", "", "")


if __name__ == "__main__":
    main()
