"""Fine-tuning throughput: Trainway against TRL's SFTTrainer (packing) and transformers' Trainer (padding), on real chats.

python benchmarks/sft.py [--rounds 5] [--way full|lora|both] [--steps 50] [--layers 30]

Every arm and round is a training of its own, from start to end, by the trainer's own means: its data path, its packing or
padding, its optimiser. All begin with the same weights (SmolLM2-135M, or its first layers) and the same conversations, and
take about the same number of target tokens per step; fp32, fused AdamW, the same rate, clipping and threads; no
checkpointing, no bf16, nothing saved or evaluated on the clock. The rate falls linearly to nothing; order and seed of the
rows turn from round to round; ratios are paired within a round. Supervised tokens per second are those whose loss counts,
over the time between the end of the fifth step and that of the last. Afterwards one function computes each model's loss
on held-out conversations; a way is void when the arms' means over the rounds differ by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from arms import bootstrap_interval, run_process  # noqa: E402
from tests.real_conversations import MARKED_CHATML, real_conversations  # noqa: E402

THREADS, WARM_UP, SEQ_LEN, ROWS = 2, 5, 512, 2
ARMS = ("trainway", "trl", "trainer")
LORA = {"r": 16, "alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RATES = {"full": 1e-4, "lora": 5e-4}
TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--way", choices=("full", "lora", "both"), default="both")
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(_RUN[options.arm[0]](json.loads(options.arm[1]))))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    print(f"{packages}, {THREADS} threads", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        material = make_material(Path(scratch), options.layers, options.steps)
        for way in ("full", "lora") if options.way == "both" else (options.way,):
            compare(way, options.rounds, material)


def make_material(scratch: Path, layers: int, steps: int) -> dict[str, Any]:
    """The shortened model, training and held-out conversations of at most SEQ_LEN tokens, and the padded arm's batch."""
    import torch
    from tests.real_models import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = MARKED_CHATML
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    rows, lengths, targets = [], [], []
    for line in real_conversations().read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        if len(encoded["input_ids"]) <= SEQ_LEN:
            rows.append(line)
            lengths.append(len(encoded["input_ids"]))
            targets.append(sum(encoded["assistant_masks"]))
    held_out = 100
    (scratch / "held-out.jsonl").write_text("\n".join(rows[:held_out]) + "\n")
    (scratch / "chats.jsonl").write_text("\n".join(rows[held_out:]) + "\n")
    (scratch / "marked.jinja").write_text(MARKED_CHATML)
    mean = statistics.mean(lengths)
    padded = max(1, round(ROWS * SEQ_LEN / mean))
    print(f"{len(rows)} conversations of {mean:.0f} tokens on average, {sum(targets) / sum(lengths):.0%} of them targets; "
          f"packed {ROWS} rows of {SEQ_LEN}, padded {padded} conversations a step")  # fmt: skip
    return {"dir": str(scratch), "steps": steps, "padded": padded}


def compare(way: str, rounds: int, material: dict[str, Any]) -> None:
    """Runs all arms and prints supervised tokens per second, held-out losses and paired ratios."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            out = f"{material['dir']}/{way}-{arm}-{number}"
            settings = json.dumps({**material, "way": way, "seed": number, "out": out})
            result = run_process(__file__, "--arm", arm, settings, threads=THREADS)
            results[arm].append(result)
            print(f"{way} round {number + 1} {arm}: {result['targets_per_s']:.0f} supervised tokens/s, "
                  f"held out {result['held_out']:.4f}, {result['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    losses = {arm: statistics.mean(result["held_out"] for result in results[arm]) for arm in ARMS}
    shown = ", ".join(f"{arm} {loss:.4f}" for arm, loss in losses.items())
    print(f"{way} held-out losses after {material['steps']} steps, means of {rounds} rounds: {shown}")
    if max(losses.values()) > (1 + TOLERANCE) * min(losses.values()):
        raise SystemExit(f"{way}: VOID, the arms did not learn the same")
    for peer in ARMS[1:]:
        pairs = zip(results["trainway"], results[peer], strict=True)
        ratios = [ours["targets_per_s"] / theirs["targets_per_s"] for ours, theirs in pairs]
        low, high = bootstrap_interval(ratios)
        print(
            f"{way} trainway / {peer}: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] (95 %)",
            flush=True,
        )


def run_trainway(settings: dict[str, Any]) -> dict[str, Any]:
    import trainway

    root = Path(settings["dir"])
    sections: dict[str, Any] = {
        "recipe": "sft",
        "seed": settings["seed"],
        "run_dir": settings["out"],
        "model": {"path": str(root / "model")},
        "data": {"train": [str(root / "chats.jsonl")], "validation": [str(root / "held-out.jsonl")],
                 "chat_template": str(root / "marked.jinja"), "store_dir": str(root / "store")},
        "train": {"total_steps": settings["steps"], "seq_len": SEQ_LEN, "micro_batch_size": ROWS, "precision": "fp32",
                  "num_threads": THREADS},
        "optim": {"lr": RATES[settings["way"]], "betas": [0.9, 0.999], "weight_decay": 0.0},
        "schedule": {"name": "linear", "warmup_steps": 0, "min_lr_ratio": 0.0},
        "eval": {"every": 100_000, "max_tokens": SEQ_LEN, "num_samples": 0},
        "checkpoint": {"save_every": 100_000},
    }  # fmt: skip
    if settings["way"] == "lora":
        sections["lora"] = LORA
    config = trainway.load_config(sections).config
    trainway.train(config)
    metrics = [
        json.loads(line) for line in (Path(settings["out"]) / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in metrics if "perf/step_s" in record]
    seconds = sum(record["perf/step_s"] for record in steps[WARM_UP:])
    targets = steps[-1]["train/tokens"] - steps[WARM_UP - 1]["train/tokens"]
    model = Path(settings["out"]) / "checkpoints/latest/model"
    return measured(targets / seconds, steps[-1]["train/loss"], model, settings)


def run_trl(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL tuned for a CPU: packing (best fit), SDPA, fused AdamW, no bf16, no checkpointing."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **_common(settings), packing=True, max_length=SEQ_LEN, assistant_only_loss=True, per_device_train_batch_size=ROWS,
    )  # fmt: skip
    model, tokenizer, peft = _loaded(settings)
    trainer = SFTTrainer(
        model, arguments, train_dataset=_dataset(settings), processing_class=tokenizer, peft_config=peft
    )
    return _timed(trainer, settings)


def run_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers.Trainer with dynamic padding."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, peft = _loaded(settings)
    rows = []
    for row in _dataset(settings):
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        marks = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [token if mark else -100 for token, mark in marks]
        rows.append({"input_ids": encoded["input_ids"], "labels": labels})
    arguments = TrainingArguments(**_common(settings), per_device_train_batch_size=settings["padded"])
    model = model if peft is None else get_peft_model(model, peft)
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    return _timed(Trainer(model, arguments, train_dataset=rows, data_collator=collator), settings)


_RUN = {"trainway": run_trainway, "trl": run_trl, "trainer": run_trainer}


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": settings["out"], "max_steps": settings["steps"], "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "learning_rate": RATES[settings["way"]], "adam_beta2": 0.999, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
        "seed": settings["seed"],
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def _loaded(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(THREADS)
    path = f"{settings['dir']}/model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = MARKED_CHATML
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = {"r": LORA["r"], "lora_alpha": LORA["alpha"], "target_modules": LORA["target_modules"]}
    return model, tokenizer, LoraConfig(**lora, task_type="CAUSAL_LM") if settings["way"] == "lora" else None


def _dataset(settings: dict[str, Any]) -> Any:
    from datasets import Dataset

    lines = (Path(settings["dir"]) / "chats.jsonl").read_text().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def _timed(trainer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    ends: list[float] = []
    targets: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        targets.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()
    steps = settings["steps"]  # the reader may have been ahead of the last step
    speed = sum(targets[WARM_UP:steps]) / (ends[-1] - ends[WARM_UP - 1])
    model = Path(settings["out"]) / "model"
    trainer.save_model(str(model))
    return measured(speed, None, model, settings)


def measured(speed: float, last_loss: float | None, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "targets_per_s": speed,
        "last_loss": last_loss,
        "held_out": held_out_loss(model, settings),
        "peak_mib": peak,
    }


def held_out_loss(directory: Path, settings: dict[str, Any]) -> float:
    """Nats per target token of the held-out conversations, one at a time, by plain transformers (and peft)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = Path(settings["dir"])
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = MARKED_CHATML
    adapted = settings["way"] == "lora"
    model = AutoModelForCausalLM.from_pretrained(
        root / "model" if adapted else directory, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, directory) if adapted else model
    nats, count = 0.0, 0
    for line in (root / "held-out.jsonl").read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        ids, marks = encoded["input_ids"], torch.as_tensor(encoded["assistant_masks"]).view(1, -1).bool()
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
        nats += losses[marks[0, 1:]].sum().item()
        count += int(marks[0, 1:].sum())
    return nats / count


if __name__ == "__main__":
    main()
