"""Answers per second in the training's own processes: ours, static and continuous, against transformers' `generate`.

python benchmarks/rollout.py [--rounds 5] [--case small|smollm2|both] [--arms static,continuous,generate] [--shared]

Every arm and round is a process of its own with the same weights, prompts, sampling and batch; the order turns round
from one round to the next. `generate` takes the prompts longest first, as many as fill the batch, each with
num_return_sequences; the others get all at once. Answers differ between the arms, and are as long on average: a case
is void when the arms' mean lengths, over all rounds, differ by more than a tenth. Ratios are paired within a round.
On a machine that others use, --shared counts the seconds that one thread computes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from arms import bootstrap_interval, run_process  # noqa: E402

THREADS = 2
ARMS = ("static", "continuous", "generate")


class Case(NamedTuple):
    """A model and what it is asked: answers to `prompts` prompts, each several times, so many at once."""

    prompts: int
    answers: int
    batch: int
    longest: int
    """Tokens of an answer at most."""
    prompt_tokens: tuple[int, int]
    temperature: float


CASES = {
    "small": Case(32, 8, 32, 192, (20, 120), 1.0),
    "smollm2": Case(16, 8, 32, 160, (30, 200), 0.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=(*CASES, "both"), default="both")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--arm", nargs=3, metavar=("CASE", "ARM", "ROUND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        case, arm, number = options.arm
        print(json.dumps(run_arm(case, arm, int(number), options.shared)))
        return
    arms = tuple(options.arms.split(","))
    for case in CASES if options.case == "both" else (options.case,):
        compare(case, arms, options.rounds, options.shared)


def compare(case: str, arms: tuple[str, ...], rounds: int, shared: bool) -> None:
    """Runs all arms of a case and prints tokens per second and paired ratios to `generate`."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            words = ["--arm", case, arm, str(number), *(["--shared"] if shared else [])]
            run = run_process(__file__, *words, threads=1 if shared else THREADS)
            results[arm].append(run)
            print(
                f"{case} round {number + 1} {arm}: {run['tokens_per_s']:.0f} tokens/s, "
                f"{run['mean_length']:.1f} tokens an answer",
                flush=True,
            )
    lengths = {arm: statistics.mean(run["mean_length"] for run in runs) for arm, runs in results.items()}
    for arm, runs in results.items():
        speed = statistics.median(run["tokens_per_s"] for run in runs)
        peak = statistics.median(run["peak_mib"] for run in runs)
        print(f"{case} {arm}: {speed:.0f} tokens/s, {lengths[arm]:.1f} tokens an answer, {peak:.0f} MiB peak")
    if max(lengths.values()) > 1.1 * min(lengths.values()):
        raise SystemExit(f"{case}: VOID, the arms' answers are not of one length")
    for arm in arms:
        if arm == "generate" or "generate" not in arms:
            continue
        pairs = zip(results[arm], results["generate"], strict=True)
        ratios = [own["tokens_per_s"] / other["tokens_per_s"] for own, other in pairs]
        low, high = bootstrap_interval(ratios)
        print(
            f"{case} {arm} / generate: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] (95 %)",
            flush=True,
        )


def run_arm(case: str, arm: str, number: int, shared: bool) -> dict[str, Any]:
    """One process: a small warm-up, then all answers; tokens per second, mean length and peak memory."""
    import resource

    import torch

    torch.set_num_threads(1 if shared else THREADS)
    clock = time.process_time if shared else time.perf_counter
    model, prompts, ends = material(case)
    answer: Callable[..., list[int]] = generate_answers if arm == "generate" else rollout_answers
    answer(arm, model, prompts[:2], ends, CASES[case]._replace(longest=8), number)
    start = clock()
    lengths = answer(arm, model, prompts, ends, CASES[case], number)
    seconds = clock() - start
    assert len(lengths) == CASES[case].prompts * CASES[case].answers
    return {
        "tokens_per_s": sum(lengths) / seconds,
        "mean_length": statistics.mean(lengths),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def material(case: str) -> tuple[Any, list[list[int]], list[int]]:
    """The model, the prompts as tokens, and the tokens that end an answer.

    small: random weights of the quick start's size; a hundredth of the vocabulary ends an answer, which makes lengths
    geometric. smollm2: the real one; an answer ends with the turn or with an empty line.
    """
    if case == "small":
        from trainway.config.schema import ModelConfig
        from trainway.models.load import build_model

        config = ModelConfig(
            hidden_size=192, num_layers=6, num_heads=3, intermediate_size=512, max_seq_len=512
        )
        model = build_model(config, 8192, seed=0).eval()
        draw = random.Random(0)
        shortest, longest = CASES[case].prompt_tokens
        prompts = [
            [draw.randrange(8192) for _ in range(draw.randint(shortest, longest))]
            for _ in range(CASES[case].prompts)
        ]
        return model, prompts, list(range(0, 8192, 100))
    from tests.real_models import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype="float32").eval()
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for question in questions(CASES[case])
    ]
    empty = [index for token, index in tokenizer.get_vocab().items() if token.endswith("ĊĊ")]
    return model, prompts, sorted({tokenizer.eos_token_id, *empty})


def questions(case: Case) -> list[str]:
    """Requests of different lengths, as people write them: a task, and more or less of what it is about."""
    draw = random.Random(1)
    tasks = (
        "Explain in your own words what this text is about.",
        "Write a short story that begins as follows.",
        "What would you advise somebody who tells you this?",
        "List the three most important points.",
    )
    sentences = (
        "The library in our village opens twice a week, and on Saturdays children read to an old dog.",
        "Rivers carry sand and clay to the sea, where they settle in layers that turn to stone.",
        "My neighbour has planted beans between the rows of maize because they feed the soil.",
        "A ship's engineer keeps a log of every repair, with the hour and the spare parts used.",
        "When the power failed, the bakery went on with its wood oven and sold bread by candlelight.",
    )
    return [
        " ".join([tasks[i % len(tasks)], *(draw.choice(sentences) for _ in range(1 + i % 9))])
        for i in range(case.prompts)
    ]


def rollout_answers(
    arm: str, model: Any, prompts: list[list[int]], ends: list[int], case: Case, number: int
) -> list[int]:
    """Lengths of all answers, by a rollout engine."""
    import numpy as np
    import torch

    from trainway.config.schema import OptimConfig
    from trainway.engines.single import SingleLearner
    from trainway.engines.world import World
    from trainway.models.causal_lm import CausalLMLoss
    from trainway.rollout.base import Request, Sampling, rollout_seed
    from trainway.rollout.continuous import ContinuousRollout
    from trainway.rollout.transformers import TransformersRollout

    world = World(0, 0, 1, 1, torch.device("cpu"))
    learner = SingleLearner(CausalLMLoss(model), model, OptimConfig(), world, "fp32")
    kind = TransformersRollout if arm == "static" else ContinuousRollout
    requests = [
        Request(np.array(prompt, np.int32), tuple(rollout_seed(number, 0, i, j) for j in range(case.answers)))
        for i, prompt in enumerate(prompts)
    ]
    sampling = Sampling(case.longest, case.temperature, 1.0, tuple(ends))
    groups = kind(learner, case.batch).generate(requests, sampling)
    return [len(rollout.tokens) for group in groups for rollout in group]


def generate_answers(
    arm: str, model: Any, prompts: list[list[int]], ends: list[int], case: Case, number: int
) -> list[int]:
    """Lengths of all answers, by `generate`: batches of prompts padded on the left."""
    import torch

    model.set_attn_implementation("sdpa")
    torch.manual_seed(number)
    ordered = sorted(prompts, key=len, reverse=True)
    each = case.batch // case.answers
    lengths = []
    for start in range(0, len(ordered), each):
        batch = ordered[start : start + each]
        longest = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=case.temperature, top_k=0, top_p=1.0,
            num_return_sequences=case.answers, max_new_tokens=case.longest, eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
        ended = torch.isin(out[:, longest:], torch.tensor(ends)).int()
        # what follows the first end token is padding
        first = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1] - longest)
        lengths += first.tolist()
    return lengths


if __name__ == "__main__":
    main()
