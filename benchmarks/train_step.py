"""Training-step throughput: Trainway against a plain PyTorch loop and transformers.Trainer, on rows and on documents.

python benchmarks/train_step.py [--rounds 5] [--case rows|documents|both]

Every arm and round is a process of its own with the same weights, token ids, optimiser and targets; the order turns
round from one round to the next (A-B-C, C-B-A, ...). Ratios are paired within a round. A case is void when the
arms' first losses differ by more than 1e-5 or their last ones by more than 1e-3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from arms import bootstrap_interval, run_process

THREADS = 2
WARM_UP, MEASURED = 2, 5
VOCAB = 16384
CASES = {"rows": ("trainway", "plain", "trainer"), "documents": ("trainway", "plain")}
SHAPES = {"rows": (8, 512), "documents": (2, 2048)}  # [B, T]
MEAN_DOCUMENT = 256
LR, BETAS, DECAY, MAX_NORM = 6e-4, (0.9, 0.95), 0.1, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=(*CASES, "both"), default="both")
    parser.add_argument("--arm", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(*options.arm)))
        return
    gemm = measured_gemm()
    print(f"GEMM, best of five 1536^3: {gemm / 1e9:.0f} GFLOP/s, {THREADS} threads", flush=True)
    for case in CASES if options.case == "both" else (options.case,):
        compare(case, options.rounds, gemm)


def compare(case: str, rounds: int, gemm: float) -> None:
    """Runs all arms of a case and prints tokens per second, share of the GEMM and paired ratios."""
    arms = CASES[case]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            results[arm].append(run_process(__file__, "--arm", case, arm, threads=THREADS))
            print(
                f"{case} round {number + 1} {arm}: {results[arm][-1]['tokens_per_s']:.0f} tokens/s",
                flush=True,
            )
    firsts, lasts = ({arm: results[arm][0]["losses"][step] for arm in arms} for step in (0, -1))
    hashes = {result["hash"] for runs in results.values() for result in runs}
    print(f"first losses {firsts}, last losses {lasts}, weights and data {hashes}")
    spreads = [max(step.values()) - min(step.values()) for step in (firsts, lasts)]
    if len(hashes) > 1 or spreads[0] > 1e-5 or spreads[1] > 1e-3:
        raise SystemExit(f"{case}: VOID, the arms did not compute the same thing")
    flops = results[arms[0]][0]["flops_per_token"]
    for arm in arms:
        speed = statistics.median(run["tokens_per_s"] for run in results[arm])
        peak = statistics.median(run["peak_mib"] for run in results[arm])
        print(
            f"{case} {arm}: {speed:.0f} tokens/s, {speed * flops / gemm:.0%} of the GEMM, {peak:.0f} MiB peak"
        )
    for peer in arms[1:]:
        ratios = [
            a["tokens_per_s"] / b["tokens_per_s"]
            for a, b in zip(results[arms[0]], results[peer], strict=True)
        ]
        low, high = bootstrap_interval(ratios)
        print(
            f"{case} trainway / {peer}: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] (95 %)",
            flush=True,
        )


def run_arm(case: str, arm: str) -> dict[str, Any]:
    """One process: warm-up, measured steps; losses, tokens per second and peak memory."""
    import resource

    import torch

    torch.set_num_threads(THREADS)
    from trainway.config.schema import ModelConfig
    from trainway.models.load import build_model
    from trainway.planning.arithmetic import flops_per_token

    config = ModelConfig(hidden_size=384, num_layers=8, num_heads=6, intermediate_size=1024)
    model = build_model(config, VOCAB, seed=0)
    # two batches in turn: their loss falls, so that a difference in the updates would show in the last loss
    batches = [make_batch(case, step % 2) for step in range(WARM_UP + MEASURED)]
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in model.state_dict().values()))
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes() + batch["labels"].numpy().tobytes())
    arms: dict[str, Callable[..., Iterator[tuple[float, float]]]]
    arms = {"trainway": trainway_steps, "plain": plain_steps, "trainer": trainer_steps}
    losses, ends = zip(*arms[arm](model, batches), strict=True)
    batch_size, seq_len = SHAPES[case]
    seconds = (ends[-1] - ends[WARM_UP - 1]) / MEASURED
    return {
        "losses": losses,
        "tokens_per_s": batch_size * seq_len / seconds,
        "hash": digest.hexdigest()[:12],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "flops_per_token": flops_per_token(config, VOCAB, seq_len if case == "rows" else MEAN_DOCUMENT),
    }


def make_batch(case: str, seed: int) -> dict[str, Any]:
    """ids, transformers' labels (unshifted), positions and document boundaries of one step."""
    import torch

    batch_size, seq_len = SHAPES[case]
    ids = torch.randint(VOCAB, (batch_size, seq_len), generator=torch.Generator().manual_seed(seed))
    labels, lengths, draw = ids.clone(), [], random.Random(seed)
    for _ in range(batch_size):
        left = seq_len
        while left:
            length = (
                seq_len if case == "rows" else min(left, max(16, round(draw.expovariate(1 / MEAN_DOCUMENT))))
            )
            lengths.append(length)
            left -= length
    boundaries = [0]
    for length in lengths:
        labels.view(-1)[boundaries[-1]] = -100  # nothing predicts the first token of a document
        boundaries.append(boundaries[-1] + length)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(batch_size, seq_len)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "boundaries": tuple(boundaries)}


def trainway_steps(model: Any, batches: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Each arm yields a step's loss and the time at which the step ended."""
    import torch

    from trainway.config.schema import OptimConfig
    from trainway.models.causal_lm import CausalLMLoss
    from trainway.optim import build_optimizers, clip_gradients

    module = CausalLMLoss(model.train())
    optimizers = build_optimizers(
        module.named_parameters(), OptimConfig(lr=LR, betas=BETAS, weight_decay=DECAY)
    )
    for batch in batches:
        shifted = torch.full_like(batch["labels"], -100)
        shifted[:, :-1] = batch["labels"][:, 1:]
        targets = int((shifted != -100).sum())
        loss = module(batch["input_ids"], shifted, batch["position_ids"], batch["boundaries"]) / targets
        loss.backward()
        clip_gradients(module.parameters(), MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield loss.item(), time.perf_counter()


def plain_steps(model: Any, batches: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """The loop that one writes by hand; positions tell transformers about documents, it makes the SDPA mask."""
    import torch

    model = plain_transformers(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item(), time.perf_counter()


def trainer_steps(model: Any, batches: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """transformers.Trainer, tuned for a CPU: fp32, fused AdamW, no checkpointing, nothing logged or saved."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    model = plain_transformers(model)
    model.config.use_cache = False
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    rows = [
        {name: batch[name][row] for name in ("input_ids", "labels")}
        for batch in batches
        for row in range(batch["input_ids"].shape[0])
    ]
    batch_size = batches[0]["input_ids"].shape[0]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, per_device_train_batch_size=batch_size, max_steps=len(batches), optim="adamw_torch_fused",
            learning_rate=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY, max_grad_norm=MAX_NORM,
            lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    yield from zip(losses, ends, strict=True)


def plain_transformers(model: Any) -> Any:
    """transformers' own model with `model`'s weights, untouched by Trainway, attention by SDPA."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    return plain.train()


def measured_gemm() -> float:
    import torch

    torch.set_num_threads(THREADS)
    a = torch.randn(1536, 1536)
    best = float("inf")
    for _ in range(6):  # the first one warms up, and cannot be the best
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1536**3 / best


if __name__ == "__main__":
    main()
