"""Material for adversarial distillation: a teacher with a style of its own, and a config whose run takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.sft_material import QUESTIONS, THINGS

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}


def teacher(path: Path, rows: int = 60, seed: int = 4) -> Path:
    """Prompts of one or two questions, some with a system prompt, and answers of very different lengths."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(rows):
            turns = [{"role": "system", "content": "Answer kindly."}] if i % 5 == 0 else []
            if i % 3 == 0:
                turns += [
                    {"role": "user", "content": "Hello?"},
                    {"role": "assistant", "content": "Hello. It is you."},
                ]
            turns.append({"role": "user", "content": f"{rng.choice(QUESTIONS)} {rng.choice(THINGS)}?"})
            words = " and ".join(rng.choice(THINGS) for _ in range(rng.randrange(1, 5)))
            file.write(json.dumps({"content": turns, "teacher_response": f"Well, {words}."}) + "\n")
    return path


def tiny_gad(base: Path, rows: Path, store_dir: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """4 warm-up steps, of which 1 is the discriminator's alone, and 4 adversarial ones of 4 prompts x 3 answers."""
    config: dict[str, Any] = {
        "recipe": "gad",
        "run_dir": str(run_dir),
        "model": {"path": str(base)},
        "data": {
            "train": [str(rows)],
            "val_ratio": 0.15,
            "store_dir": str(store_dir),
            "max_prompt_tokens": 64,
            "max_response_tokens": 12,
        },
        "gad": {
            "warmup_steps": 4,
            "adversarial_steps": 4,
            "discriminator_only_steps": 1,
            "tokens_per_gpu": 128,
            "kl_coef": 0.05,
        },
        "rollout": {"num_per_prompt": 3, "batch_size": 8},
        "train": {"global_batch_size": 4, "num_threads": 1, "max_grad_norm": 0.2},
        "optim": {"lr": 3e-3, "weight_decay": 0.01, "betas": [0.9, 0.999]},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "checkpoint": {"save_every": 2, "keep_last": 2},
        "eval": {"every": 4, "num_prompts": 6, "num_samples": 2},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


KEYS = ("step", "samples", "train/student_loss", "train/discriminator_loss", "optim/student_norm",
        "optim/discriminator_norm", "gad/student_score", "gad/teacher_score", "gad/response_length", "gad/kl")  # fmt: skip


def gad_stream(run_dir: Path) -> list[tuple[object, ...]]:
    """What must be bit-identical after any interruption: rollouts show in the scores and lengths."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(record.get(key) for key in KEYS) for record in records if "samples" in record]
