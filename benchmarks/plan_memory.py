"""The plan's memory estimate against the measured peak of real runs on a CPU: pretraining and fine-tuning, every engine.

python benchmarks/plan_memory.py [--case NAME ...] [--allocator returning|default] [--material DIR] [--list | --plan]

A case is a real run of three steps on the Python standard library, by the recipe's own means. Each of its ranks is a process
of its own, forked from one that has imported everything and trained small models. Measured is the process's VmHWM from the
moment that the weights are there, above its VmRSS right before the model is built, the highest rank. Pages of files (the token
store, model files, libraries), which the kernel takes back when it likes, do not count: RssFile is taken off both. `returning` holds glibc's threshold of mapped blocks at its first value,
128 KiB, so that what is freed leaves the process; `default` is what a run does by itself: glibc keeps freed blocks, and its peak depends on how
they happen to fit into each other.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

GIB = 2**30
VOCAB = 16384
RETURNED = 128 << 10
"""Blocks of at least so many bytes are mapped and, when freed, returned."""
SHAPES: dict[str, dict[str, Any]] = {
    "4M": {"hidden_size": 128, "num_layers": 8, "num_heads": 2, "intermediate_size": 384},
    "20M": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "intermediate_size": 1024},
    "42M": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 1408, "tie_embeddings": False},
    "50M": {"hidden_size": 768, "num_layers": 6, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 2048},
    "qwen3 4M": {"architecture": "qwen3", "hidden_size": 128, "num_layers": 8, "num_heads": 4, "num_kv_heads": 2,
                 "head_dim": 64, "intermediate_size": 384},
    "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
}  # fmt: skip
LORA, WIDE = {"enabled": True}, {"enabled": True, "r": 32, "target_modules": ["all-linear"]}


def _case(shape: str, rows: str, recipe: str = "pretrain", ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """`rows`: micro-batch x tokens of a row x micro-batches of a step; `settings`: by section and name, section__name."""
    return {"shape": shape, "rows": rows, "recipe": recipe, "ranks": ranks, "settings": settings}


FULL, SELECTIVE = (
    {"train__activation_checkpointing": "full"},
    {"train__activation_checkpointing": "selective"},
)
DDP, FSDP = ({"ranks": 2, "engine__name": name} for name in ("ddp", "fsdp"))
CASES: dict[str, dict[str, Any]] = {
    "4M, many tokens": _case("4M", "8x512x1"),
    "4M, full": _case("4M", "16x512x1", **FULL),
    "4M sft lora": _case("4M", "8x512x1", "sft", lora=LORA),
    "20M, one micro-batch": _case("20M", "2x256x1"),
    "50M, few tokens": _case("50M", "1x128x2"),
    "20M ddp": _case("20M", "1x256x2", **DDP),
    "20M fsdp": _case("20M", "1x256x2", **FSDP),
    "4M, selective": _case("4M", "8x512x1", **SELECTIVE),
    "4M fsdp, full": _case("4M", "8x512x2", **FSDP, **FULL),
    "4M fsdp sft lora": _case("4M", "8x512x1", "sft", lora=LORA, **FSDP),
    "qwen3 4M": _case("qwen3 4M", "8x512x1"),
    "4M sft, padded": _case("4M", "32x128x1", "sft", data__packing="none"),
    "4M sft, eager attention": _case("4M", "16x128x1", "sft", model__attention="eager", data__packing="none"),
    "20M, muon": _case("20M", "1x256x1", optim__name="muon"),
    "50M sft lora, all linear": _case("50M", "2x128x1", "sft", lora=WIDE),
    "20M ddp, one micro-batch": _case("20M", "1x256x1", **DDP),
    "4M, long rows": _case("4M", "2x2048x2", train__loss_chunk_tokens=64),
    "42M, full": _case("42M", "2x128x2", train__loss_chunk_tokens=64, **FULL),
    "4M sft lora, full": _case("4M", "16x512x1", "sft", lora=WIDE, **FULL),
    "4M sft lora, selective": _case("4M", "8x512x2", "sft", lora=LORA, **SELECTIVE),
    "4M ddp sft lora": _case("4M", "4x512x1", "sft", lora=LORA, **DDP),
    "42M fsdp, one micro-batch": _case("42M", "1x128x1", **FSDP),
    "4M, rows without borders": _case("4M", "8x512x2", data__packing="concat"),
    "4M ddp, full": _case("4M", "8x512x1", **DDP, **FULL),
    "20M": _case("20M", "4x512x2"),
    "42M": _case("42M", "2x512x2"),
    "50M": _case("50M", "2x512x2"),
    "50M sft": _case("50M", "2x512x2", "sft"),
    "50M sft lora": _case("50M", "4x512x1", "sft", lora=LORA),
    "50M fsdp, full": _case("50M", "2x512x2", **FSDP, **FULL),
}
"""The last six take minutes each on two cores; the others are chosen to hold much and compute little."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--allocator", choices=("returning", "default"), default="returning")
    parser.add_argument(
        "--material", type=Path, help="where data and models are kept; else they are made anew"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--plan", action="store_true", help="print what is planned, and run nothing")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    if options.plan:
        for name in options.case:
            print(f"{name}: {describe(CASES[name])}")
        return
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    off = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), options.material or Path(scratch), options.allocator == "returning")
        print("| case | planned MiB | measured MiB | planned / measured |\n|---|---|---|---|", flush=True)
        for name in options.case:
            planned, measured = plan(CASES[name]).total, bench.measure(CASES[name])
            off += [name] if abs(planned / measured - 1) > 0.1 else []
            print(f"| {name} | {planned / 2**20:.0f} | {measured / 2**20:.0f} | {planned / measured:.3f} |", flush=True)  # fmt: skip
    print(f"{len(options.case) - len(off)} of {len(options.case)} within 10 %" + f"; not: {off}" * bool(off))


class Bench:
    """Material, and the process whose children are the runs."""

    def __init__(self, scratch: Path, material: Path, returning: bool) -> None:
        self._scratch, self._material, self._count = scratch, material, 0
        if returning:
            _return_what_is_freed()
        _quietly(scratch / "warm-up.log", self._warm_up)

    def measure(self, case: dict[str, Any]) -> int:
        """Measured bytes of the rank with the highest peak."""
        self._count += 1
        config = _config(case, self._material) | {"run_dir": str(self._scratch / f"run-{self._count}")}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [self._fork(config, rank, case["ranks"], port) for rank in range(case["ranks"])]
        found = []
        for rank, child in enumerate(children):
            if os.waitpid(child, 0)[1]:
                raise SystemExit((self._scratch / f"rank-{rank}.log").read_text()[-4000:])
            found.append(int((self._scratch / f"rank-{rank}.peak").read_text()))
        return max(found)

    def _fork(self, config: dict[str, Any], rank: int, ranks: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            peak = _quietly(self._scratch / f"rank-{rank}.log", lambda: run(config))
            (self._scratch / f"rank-{rank}.peak").write_text(str(peak))
            code = 0
        finally:
            os._exit(code)

    def _warm_up(self) -> None:
        import torch

        make_material(self._material)
        # the last one is as large as the grid's: the buffers of the libraries that multiply are no part of a run's tensors
        warm = [
            _case("tiny", "1x64x1", "sft", **more) for more in ({}, {"lora": LORA}, {"data__packing": "none"})
        ]
        for number, case in enumerate([*warm, _case("20M", "2x256x1")]):
            run(_config(case, self._material) | {"run_dir": str(self._scratch / f"warm-{number}")})
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what a child could use again would not be counted
        torch.set_num_threads(1)


def make_material(directory: Path) -> None:
    """The corpus, its pairs, a tokenizer, and a random model of each shape; what is there already stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainway.config.load import load_config
    from trainway.data.prepare import prepare
    from trainway.recipes.quickstart import write_corpus, write_pairs

    for path in write_corpus(directory / "data"):
        write_pairs(path, path.with_name(f"pairs-{path.name}"))
    prepared = prepare(load_config(_config(_case("tiny", "1x64x1"), directory)).config)
    for name, shape in SHAPES.items():
        if "architecture" in shape or (directory / name).exists():
            continue
        config = LlamaConfig(
            vocab_size=VOCAB,
            num_hidden_layers=shape["num_layers"],
            hidden_size=shape["hidden_size"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape.get("num_kv_heads"),
            intermediate_size=shape["intermediate_size"],
            max_position_embeddings=2048,
            tie_word_embeddings=shape.get("tie_embeddings", True),
            bos_token_id=prepared.manifest.bos_id,
            eos_token_id=prepared.manifest.eos_id,
        )
        LlamaForCausalLM(config).save_pretrained(directory / name)
        for file in prepared.tokenizer_dir.iterdir():
            (directory / name / file.name).write_bytes(file.read_bytes())


def _config(case: dict[str, Any], material: Path) -> dict[str, Any]:
    micro, length, accumulation = map(int, case["rows"].split("x"))
    tuning = case["recipe"] == "sft"
    data, prefix = material / "data", "pairs-" if tuning else ""
    shape = SHAPES[case["shape"]]
    config: dict[str, Any] = {
        "recipe": case["recipe"],
        "model": {"path": str(material / case["shape"])} if tuning else {**shape, "max_seq_len": 2048},
        "data": {
            "train": [str(data / f"{prefix}stdlib.jsonl")],
            "validation": [str(data / f"{prefix}held-out.jsonl")],
            "store_dir": str(material / "store"),
        },
        "train": {
            "total_steps": 3,  # DDP makes its buckets anew in the second
            "seq_len": length,
            "micro_batch_size": micro,
            "grad_accum_steps": accumulation,
            "num_threads": 1,
            "precision": "fp32",
        },
        "schedule": {"warmup_steps": 0},
        "checkpoint": {"save_every": 1000},
        "eval": {"every": 1000, "max_tokens": 512, "num_samples": 1, "max_new_tokens": 2, "after_training": False},
    }  # fmt: skip
    if not tuning:
        config["tokenizer"] = {"vocab_size": VOCAB, "sample_mib": 4}
    for key, value in case["settings"].items():
        section, _, name = key.partition("__")
        config[section] = config.get(section, {}) | {name: value} if name else value
    return config


def plan(case: dict[str, Any]) -> Any:
    """The plan's estimate of a case."""
    from trainway.config.load import load_config
    from trainway.config.schema import ModelConfig
    from trainway.planning.geometry import plan_memory, resolve_geometry
    from trainway.planning.shapes import new_shape

    config = load_config(_config(case, Path())).config
    shape = new_shape(ModelConfig(**SHAPES[case["shape"]]), VOCAB)
    half = config.train.precision == "bf16"
    return plan_memory(
        config, shape, resolve_geometry(config, case["ranks"]), half_precision=half, on_cpu=True
    )


def describe(case: dict[str, Any]) -> str:
    estimate = plan(case)
    parts = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in vars(estimate).items() if value)
    return f"{estimate.total / 2**20:.0f} MiB: {parts}"


def run(config: dict[str, Any]) -> int:
    """Train; what this rank took from the building of its model on, in bytes."""
    from trainway.config.load import load_config
    from trainway.launch.local import train_here
    from trainway.recipes import supervised

    build, learn, before = supervised.build_run_model, supervised.build_learner, 0

    def building(session: Any) -> Any:
        nonlocal before
        before = _status("VmRSS") - _status("RssFile")
        return build(session)

    def learning(*arguments: Any) -> Any:
        learner = learn(*arguments)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        return learner

    supervised.build_run_model, supervised.build_learner = building, learning
    try:
        train_here(load_config(config).config, resume="never")
    finally:
        supervised.build_run_model, supervised.build_learner = build, learn
    return _status("VmHWM") - _status("RssFile") - before


def _return_what_is_freed() -> None:
    from trainway.engines import fsdp

    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED)
    fsdp._give_freed_memory_back = lambda: None  # its threshold is higher


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def _quietly(log: Path, work: Any) -> Any:
    """What `work` returns; what it prints, and its error, goes to `log`."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for number in (1, 2):
            os.dup2(file, number)
        return work()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)


if __name__ == "__main__":
    main()
