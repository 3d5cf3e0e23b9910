"""A whole adversarial step against TRL's GRPO step with a callable reward, at equal prompts, answers and lengths.

python benchmarks/gad_step.py [--rounds 3] [--steps 8] [--layers 8] [--shared]

Both train SmolLM2-135M's first layers (fp32, fused AdamW, KL to a frozen reference) on the same prompts: 8 a step, 8 answers
each, every answer exactly 48 tokens (no end token counts). TRL samples with transformers' generate and asks a callable for
the rewards, which costs nothing; our step trains a discriminator of the student's size as well, and takes its rewards from there.
Seconds are medians over the steps after the second; arms are interleaved in fresh processes, ratios paired within a round. Two
ratios are printed: of the whole step, discriminator included, and of what both do (answers and the student's update).
`--shared` is for a machine with other work on it: one thread, and the processor's time instead of the clock's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from arms import bootstrap_interval, run_process  # noqa: E402

THREADS, PROMPTS, GROUP, LENGTH, WARM_UP = 2, 8, 8, 48, 2
WORDS = "what where who tell me about the sea a mountain my bicycle this tree the north wind river bread and".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shared", action="store_true", help="one thread, processor time")
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        settings = json.loads(options.arm[1])
        if settings["shared"]:
            time.perf_counter = time.process_time  # what both arms read
        print(json.dumps(_RUN[options.arm[0]](settings)))
        return
    threads = 1 if options.shared else THREADS
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    clock = "processor time" if options.shared else "wall time"
    print(f"{packages}, {threads} threads, {clock}", flush=True)
    whole, common = [], []
    with tempfile.TemporaryDirectory() as scratch:
        make_material(Path(scratch), options.layers)
        for number in range(options.rounds):
            found = {}
            for arm in ("trainway", "trl") if number % 2 == 0 else ("trl", "trainway"):
                settings = {"dir": scratch, "steps": options.steps, "out": f"{scratch}/{arm}-{number}",
                            "threads": threads, "shared": options.shared}  # fmt: skip
                found[arm] = run_process(__file__, "--arm", arm, json.dumps(settings), threads=threads)
                print(f"round {number + 1} {arm}: {show(found[arm])}", flush=True)
            whole.append(found["trl"]["step"] / found["trainway"]["step"])
            common.append(
                found["trl"]["step"] / (found["trainway"]["rollout"] + found["trainway"]["student"])
            )
    for name, ratios in (("whole step", whole), ("answers and the student's update", common)):
        low, high = bootstrap_interval(ratios)
        print(
            f"{name}, trl's seconds / trainway's: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] (95 %)"
        )


def make_material(scratch: Path, layers: int) -> None:
    import torch
    from tests.real_conversations import MARKED_CHATML
    from tests.real_models import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = MARKED_CHATML
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    # an answer that never ends has the length that is asked for, in both arms
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    rng = random.Random(1)
    with (scratch / "rows.jsonl").open("w") as file:
        for _ in range(400):
            said = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(5, 60)))
            answer = " ".join(rng.choice(WORDS) for _ in range(30))
            turns = [{"role": "user", "content": said}]
            file.write(json.dumps({"content": turns, "teacher_response": answer}) + "\n")


def run_trainway(settings: dict[str, Any]) -> dict[str, float]:
    import trainway
    from trainway.recipes import gad

    root, steps = Path(settings["dir"]), settings["steps"]
    gad.end_tokens = lambda *_: (2**31 - 1,)  # of no vocabulary: every answer is of full length
    config = {
        "recipe": "gad", "run_dir": settings["out"], "model": {"path": str(root / "model")},
        "data": {"train": [str(root / "rows.jsonl")], "val_ratio": 0.02, "store_dir": f"{settings['out']}-store",
                 "max_prompt_tokens": 256, "max_response_tokens": LENGTH},
        "gad": {"warmup_steps": 1, "adversarial_steps": steps, "discriminator_only_steps": 1, "tokens_per_gpu": 2048},
        "rollout": {"num_per_prompt": GROUP, "batch_size": PROMPTS * GROUP},
        "train": {"global_batch_size": PROMPTS, "num_threads": settings["threads"], "precision": "fp32"},
        "optim": {"lr": 1e-6, "betas": [0.9, 0.999], "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "checkpoint": {"save_every": 1000}, "eval": {"every": 1000, "num_prompts": 1, "num_samples": 0},
    }  # fmt: skip
    trainway.train(trainway.load_config(config).config)
    lines = (Path(settings["out"]) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record.get("gad/kl") is not None][WARM_UP:]
    assert all(record["gad/response_length"] == LENGTH for record in records)
    found = {
        name: statistics.median(record[f"gad/{name}_s"] for record in records)
        for name in ("rollout", "score", "discriminator", "student")
    }
    found["step"] = statistics.median(record["perf/step_s"] for record in records)
    found["answer_tokens_per_s"] = PROMPTS * GROUP * LENGTH / found["rollout"]
    return found


def run_trl(settings: dict[str, Any]) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings["threads"])
    root, ends = Path(settings["dir"]), []
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    arguments = GRPOConfig(
        output_dir=settings["out"], max_steps=settings["steps"], per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * GROUP // 16, num_generations=GROUP, max_completion_length=LENGTH,
        temperature=0.8, beta=0.001, epsilon=0.2, loss_type="bnpo", learning_rate=1e-6, optim="adamw_torch_fused",
        weight_decay=0.0, save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, generation_kwargs={"min_new_tokens": LENGTH},
    )  # fmt: skip
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(sum(ids) % 97) for ids in completion_ids]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer = GRPOTrainer(
        model, reward, args=arguments, train_dataset=Dataset.from_list([{"prompt": r["content"]} for r in rows]),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    assert set(lengths) == {LENGTH}, set(lengths)
    seconds = [after - before for before, after in pairwise(ends)]
    return {"step": statistics.median(seconds[WARM_UP - 1 :])}


_RUN = {"trainway": run_trainway, "trl": run_trl}


def show(found: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.2f}{'' if name.endswith('per_s') else ' s'}" for name, value in found.items()
    )


if __name__ == "__main__":
    main()
