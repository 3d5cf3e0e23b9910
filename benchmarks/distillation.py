"""Does the adversarial stage bring a student nearer to its teacher than imitation alone, at as many student updates?

python benchmarks/distillation.py --out DIR [--seeds 3] [--updates 300] [--warmup 150]

Student: the quick start's model, pretrained on Python's standard library (made in DIR if it is not there). Teacher: the
first lines of real docstrings, given the function's signature; whole modules are held out. Arms, each from the same
weights, with the same number of student updates on batches of the same size:

    seqkd   cross-entropy on the teacher's answers
    gad     warm-up (the discriminator alone for 10 steps, then both), then adversarial

Declared beforehand: the measure is how well a judge tells the arm's answers from the teacher's on held-out prompts, as
a share of pairs; 0.5 is chance, lower is better. A judge is a fresh discriminator, trained on answers to training prompts with
the same steps and seed for every arm, and none of its weights or answers took part in training. Beside it: the Jensen-Shannon
divergence of token bigrams from the teacher's, mean lengths, ROUGE-L. Answers are sampled as in training (temperature 0.8).
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

PROMPTS, GROUP, LENGTH = 16, 4, 32
JUDGE_ROWS, JUDGE_STEPS, JUDGE_BATCH, JUDGE_LR = 1600, 150, 16, 2e-4
HELD_OUT = 400


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=150, help="student updates of gad's warm-up")
    parser.add_argument("--seqkd-lr", type=float, default=5e-4)
    parser.add_argument("--warmup-lr", type=float, default=5e-4)
    parser.add_argument("--lr", type=float, default=2e-5, help="of the adversarial stage's student")
    parser.add_argument("--discriminator-lr", type=float, default=3e-4)
    parser.add_argument("--kl", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(2)
    out = options.out
    student = make_student(out)
    train, held_out = make_rows(out)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for arm, run in train_arms(options, student, train, held_out, seed).items():
            figures = measure(run, student, train, held_out, seed)
            results.setdefault(arm, []).append(figures)
            print(f"seed {seed} {arm}: {show(figures)}", flush=True)
    for arm, figures in results.items():
        means = {key: statistics.mean(found[key] for found in figures) for key in figures[0]}
        print(f"{arm}, mean of {options.seeds} seeds: {show(means)}")
    better = [
        gad["judge"] < seqkd["judge"] for gad, seqkd in zip(results["gad"], results["seqkd"], strict=True)
    ]
    print(f"the judge tells gad's answers less well than seqkd's in {sum(better)} of {len(better)} seeds")


def make_student(out: Path) -> Path:
    """The quick start's first stage, exported."""
    from trainway import export, load_config
    from trainway.recipes.pretrain import pretrain
    from trainway.recipes.quickstart import write_corpus

    if not (out / "student").exists():
        corpus, held_out = write_corpus(out / "data")
        words = [f"data.train={json.dumps([str(corpus)])}", f"data.validation={json.dumps([str(held_out)])}",
                 f"data.store_dir={out / 'cache'}", f"run_dir={out / 'pretraining'}"]  # fmt: skip
        export(pretrain(load_config("quickstart", words).config).run_dir, out / "student")
    return out / "student"


def make_rows(out: Path) -> tuple[Path, Path]:
    """(signature, first line of the docstring) as prompt and completion, of training and of held-out modules."""
    from trainway.recipes.quickstart import write_corpus

    paths = []
    for path in write_corpus(out / "data"):
        rows = {}
        for line in path.read_text().splitlines():
            for node in ast.walk(ast.parse(json.loads(line)["text"])):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                said = (ast.get_docstring(node) or "").strip().partition("\n")[0]
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                if 8 <= len(said) <= 90 and len(prompt) <= 120:
                    rows[prompt] = said
        made = path.with_name(f"docstrings-{path.name}")
        shuffled = random.Random(0).sample(sorted(rows.items()), len(rows))
        made.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in shuffled))
        paths.append(made)
    return paths[0], paths[1]


def train_arms(
    options: argparse.Namespace, student: Path, train: Path, held_out: Path, seed: int
) -> dict[str, Path]:
    """Run directories of the start, of both arms, and of the warm-up between."""
    out = options.out / f"seed-{seed}"
    steps = {"seqkd": options.updates, "warmup": 10 + options.warmup, "gad": options.updates - options.warmup}

    def run(name: str, stage: str, **settings: Any) -> Path:
        import trainway

        lr = settings.pop("lr")
        config = {
            "recipe": "gad", "seed": seed, "run_dir": str(out / name), "model": {"path": str(student)},
            "data": {"train": [str(train)], "validation": [str(held_out)], "store_dir": str(options.out / "cache"),
                     "max_prompt_tokens": 96, "max_response_tokens": LENGTH},
            "gad": {"stage": stage, "tokens_per_gpu": 4096, **settings},
            "rollout": {} if stage == "seqkd" else {"num_per_prompt": GROUP, "batch_size": 64},
            "train": {"global_batch_size": PROMPTS, "max_grad_norm": 1.0},
            "optim": {"lr": lr, "betas": [0.9, 0.999], "weight_decay": 0.01},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "checkpoint": {"save_every": 1000}, "eval": {"every": 100, "num_prompts": 100, "num_samples": 8},
        }  # fmt: skip
        trainway.train(trainway.load_config(config).config)
        return out / name

    seqkd = run("seqkd", "seqkd", lr=options.seqkd_lr, seqkd_lr=options.seqkd_lr, seqkd_steps=steps["seqkd"])
    warmup = run(
        "warmup", "warmup", lr=options.warmup_lr, warmup_steps=steps["warmup"],
        discriminator_lr=options.discriminator_lr,
    )  # fmt: skip
    adversarial = run(
        "gad", "adversarial", lr=options.lr, adversarial_steps=steps["gad"], warmup_run=str(warmup),
        discriminator_lr=options.discriminator_lr, kl_coef=options.kl,
    )  # fmt: skip
    return {"seqkd": seqkd, "warmup": warmup, "gad": adversarial}


# ---- the measure


def measure(run: Path, student: Path, train: Path, held_out: Path, seed: int) -> dict[str, float]:
    from trainway.gad.measures import rouge_l
    from trainway.release.bundle import export
    from trainway.release.generate import load_causal_lm

    if not (run / "exported").exists():
        export(run, run / "exported", which="latest")
    model, tokenizer = load_causal_lm(run / "exported")
    learnt = pairs(model, tokenizer, train, JUDGE_ROWS, seed)
    unseen = pairs(model, tokenizer, held_out, HELD_OUT, seed)
    ours = [np.asarray(pair["student"]) for pair in unseen]
    teachers = [np.asarray(pair["teacher"]) for pair in unseen]
    texts = [
        [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in side] for side in (ours, teachers)
    ]
    return {
        "judge": judge(student, learnt, unseen),
        "bigrams": divergence(ours, teachers),
        "length": statistics.mean(map(len, ours)),
        "teacher_length": statistics.mean(map(len, teachers)),
        "rouge_l": statistics.mean(rouge_l(a, b) for a, b in zip(*texts, strict=True)),
    }  # fmt: skip


def pairs(model: Any, tokenizer: Any, path: Path, count: int, seed: int) -> list[dict[str, list[int]]]:
    """A prompt, the teacher's answer and one of the model's, as tokens."""
    from trainway.config.schema import DataConfig
    from trainway.data.chat import Encoded
    from trainway.data.records import parse_record
    from trainway.data.teacher import TeacherEncoder, end_tokens, own_template
    from trainway.rollout.base import Request, Sampling, rollout_seed
    from trainway.rollout.transformers import TransformersRollout

    encoder = TeacherEncoder(tokenizer, DataConfig(max_prompt_tokens=96, max_response_tokens=LENGTH))
    records = [parse_record(json.loads(line)) for line in path.read_text().splitlines()[:count]]
    rows = [row for row in encoder(records) if isinstance(row, Encoded)]
    begins = [int(np.flatnonzero(row.trained)[0]) for row in rows]
    learner: Any = SimpleNamespace(model=model, whole=nullcontext)
    sampling = Sampling(LENGTH, 0.8, 1.0, end_tokens(tokenizer, own_template(tokenizer)))
    requests = [
        Request(row.tokens[:begin], (rollout_seed(seed, 1 << 20, index, 0),))
        for index, (row, begin) in enumerate(zip(rows, begins, strict=True))
    ]
    answers = TransformersRollout(learner, 64).generate(requests, sampling)
    return [
        {"prompt": row.tokens[:begin].tolist(), "teacher": row.tokens[begin:].tolist(), "student": answer.tokens.tolist()}
        for row, begin, (answer,) in zip(rows, begins, answers, strict=True)
    ]  # fmt: skip


def judge(student: Path, learnt: list[dict[str, list[int]]], unseen: list[dict[str, list[int]]]) -> float:
    """Share of unseen pairs in which a discriminator, trained on the learnt ones, scores the teacher higher."""
    from trainway.checkpoint.weights import model_pieces
    from trainway.gad.losses import bradley_terry
    from trainway.gad.sequences import Exchange, lay_out
    from trainway.models.base import BaseWeights, find_base
    from trainway.models.discriminator import (
        DiscriminatorLoss,
        DiscriminatorWeights,
        build_discriminator,
        use_discriminator_attention,
    )
    from trainway.models.load import allocate

    base = find_base(str(student), cache=student.parent / "cache")
    model = build_discriminator(base, dtype=torch.float32)
    use_discriminator_attention(model, base, "auto", packed=True)
    module = DiscriminatorLoss(model)
    allocate(module, model, device="cpu")
    DiscriminatorWeights.of(BaseWeights(base), model, seed=12345)(model_pieces(model).items())
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=JUDGE_LR, weight_decay=0.01)
    rng = random.Random(12345)

    def scores(batch: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        both = [
            Exchange(np.array(pair["prompt"]), np.array(pair[side])) for side in ("teacher", "student") for pair in batch
        ]  # fmt: skip
        part = lay_out(both, range(len(both)), 0, packed=True)
        found = module(part.batch.input_ids, part.batch.position_ids, part.batch.boundaries, part.last)
        return found[: len(batch)], found[len(batch) :]

    for step in range(JUDGE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = JUDGE_LR * (1 - step / JUDGE_STEPS)
        teacher, own = scores(rng.sample(learnt, JUDGE_BATCH))
        optimizer.zero_grad()
        bradley_terry(teacher, own[:, None]).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    right = []
    with torch.no_grad():
        for start in range(0, len(unseen), 50):
            teacher, own = scores(unseen[start : start + 50])
            right += (teacher > own).tolist()
    return statistics.mean(right)


def divergence(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Jensen-Shannon divergence in bits of the distributions of token bigrams."""
    counts = [Counter(pair for text in side for pair in zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
              for side in (ours, theirs)]  # fmt: skip
    keys = sorted(counts[0] | counts[1])
    p, q = (np.array([found[key] for key in keys], dtype=float) / found.total() for found in counts)
    middle = (p + q) / 2

    def to_middle(side: np.ndarray) -> float:
        own = side > 0
        return float((side[own] * np.log2(side[own] / middle[own])).sum())

    return (to_middle(p) + to_middle(q)) / 2


def show(figures: dict[str, float]) -> str:
    return (
        f"judge {figures['judge']:.3f}  bigrams {figures['bigrams']:.4f}  length {figures['length']:.1f} "
        f"(teacher {figures['teacher_length']:.1f})  ROUGE-L {figures['rouge_l']:.3f}"
    )


if __name__ == "__main__":
    main()
