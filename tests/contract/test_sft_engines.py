"""Every engine tunes as one process does: full and LoRA, packed and padded, dense and a mixture of experts."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import kill_all, launch, metrics, once, run_cli, shared, stream, wait_for, write_config
from tests.sft_material import EXPERT_LORA, LORA, base_model, conversations, tiny_sft
from trainway.release.bundle import export, model_directory
from trainway.release.generate import load_causal_lm

ENGINES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["engine.name=single"]),
    "ddp": (2, ["engine.name=ddp"]),
    "fsdp": (2, ["engine.name=fsdp"]),
    "zero2": (2, ["engine.name=zero2"]),
    "zero3": (2, ["engine.name=zero3"]),
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "full-packed": ("llama", {}),
    "full-padded": ("llama", {"data": {"packing": "none"}}),
    "lora-packed": ("llama", {"lora": LORA, "optim": {"lr": 2e-2}}),
    "lora-padded": ("llama", {"lora": LORA, "optim": {"lr": 2e-2}, "data": {"packing": "none"}}),
    "gpt_oss-full": ("gpt_oss", {}),
    "gpt_oss-experts": ("gpt_oss", {"lora": EXPERT_LORA, "optim": {"lr": 2e-2}}),
}
OFTEN = {
    ("full-packed", "single"),
    ("full-packed", "fsdp"),
    ("full-packed", "zero3"),
    ("lora-padded", "ddp"),
    ("gpt_oss-experts", "single"),
    ("gpt_oss-experts", "fsdp"),
}
"""What the default suite holds: the engines and the ways, not all pairs; those are slow."""


def slow(*case: str, when: bool) -> Any:
    return pytest.param(*case, marks=[pytest.mark.slow] if when else [])


CASES = [
    slow(way, engine, when=(way, engine) not in OFTEN)
    for way in WAYS
    for engine in ENGINES
    if engine != "single"
]
KILLED = [(way, engine) for way in ("full-packed", "lora-packed") for engine in ENGINES]


class Runs:
    """Runs of the contract, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.chats = root / "chats.jsonl"
        once(self.chats, lambda: conversations(self.chats))

    def config(self, way: str, run: Path, **sections: Any) -> dict[str, Any]:
        family, settings = WAYS[way]
        base = once(self.root / family, lambda: base_model(self.root / family, family))
        config = tiny_sft(base, self.chats, self.root / "stores", run, **settings)
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values}
        return config

    def __call__(self, way: str, engine: str) -> Path:
        run = self.root / f"{way}-{engine}"

        def make() -> None:
            nproc, settings = ENGINES[engine]
            path = write_config(run.with_suffix(".yaml"), self.config(way, run))
            run_cli("train", path, "--nproc", nproc, *settings, timeout=600)

        return once(run, make)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared(tmp_path_factory, "sft"))


@pytest.mark.parametrize(("way", "engine"), CASES)
def test_an_engine_tunes_as_one_process_does(runs: Runs, tmp_path: Path, way: str, engine: str) -> None:
    single, other = runs(way, "single"), runs(way, engine)
    steps, other_steps = metrics(single), metrics(other)
    assert len(steps) == len(other_steps) == 20
    for a, b in zip(steps, other_steps, strict=True):
        assert a["samples"] == b["samples"]
        assert a["train/tokens"] == b["train/tokens"]
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["optim/grad_norm"] == pytest.approx(a["optim/grad_norm"], rel=1e-4)
    assert steps[-1]["train/loss"] < 0.95 * steps[0]["train/loss"]
    name = "adapter_model.safetensors" if "lora" in WAYS[way][1] else "model.safetensors"
    a, b = (load_file(export(run, tmp_path / run.name, which="latest") / name) for run in (single, other))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)


GPT_OSS = [
    slow(way, engine, when=(way, engine) not in OFTEN)
    for way in WAYS
    if "gpt_oss" in way
    for engine in ENGINES
]


@pytest.mark.parametrize(("way", "engine"), GPT_OSS)
def test_others_read_what_gpt_oss_became(runs: Runs, tmp_path: Path, way: str, engine: str) -> None:
    """transformers and peft give the logits of the run's own checkpoint, under transformers' own attention."""
    run, base = runs(way, engine), runs.root / "gpt_oss"
    log = (run / "log.txt").read_text()
    assert re.search(r"trainable [\d,]+ of [\d,]+ parameters|all [\d,]+ parameters are trained", log)
    exported = export(run, tmp_path / "exported")
    if "lora" in WAYS[way][1]:
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        theirs = PeftModel.from_pretrained(plain, exported)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    ours, tokenizer = load_causal_lm(model_directory(run))
    ids = tokenizer(tokenizer.decode(range(5, 90)), return_tensors="pt")[
        "input_ids"
    ]  # longer than the window
    with torch.no_grad():
        logits, trained, untrained = (
            model.eval()(ids).logits for model in (ours, theirs, AutoModelForCausalLM.from_pretrained(base))
        )
    torch.testing.assert_close(logits, trained, rtol=0, atol=2e-5)
    assert (logits - untrained).abs().max() > 0.1


@pytest.mark.slow  # of pretraining the default suite has it
@pytest.mark.parametrize("way", ["full-packed", "lora-packed"])
def test_every_engine_goes_on_from_every_other(runs: Runs, tmp_path: Path, way: str) -> None:
    """ddp x 2 → fsdp x 2 → zero3 x 2 → single in one run: the same rows and losses."""
    path = write_config(tmp_path / "c.yaml", runs.config(way, tmp_path / "run", checkpoint={"save_every": 5}))
    for step, engine in zip((5, 10, 15, 20), ("ddp", "fsdp", "zero3", "single"), strict=True):
        nproc, settings = ENGINES[engine]
        process = launch(path, "--nproc", str(nproc), *settings)
        wait_for(lambda s=step: (tmp_path / f"run/checkpoints/step-{s}").is_dir(), process)
        if step < 20:
            process.send_signal(signal.SIGTERM)
        assert process.wait(300) == (75 if step < 20 else 0), (tmp_path / "launch.log").read_text()
    for a, b in zip(metrics(tmp_path / "run"), metrics(runs(way, "single")), strict=True):
        assert (a["step"], a["samples"]) == (b["step"], b["samples"])
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


@pytest.mark.slow  # of pretraining the default suite has it
@pytest.mark.parametrize(("way", "engine"), KILLED)
def test_killed_it_goes_on_bit_for_bit(runs: Runs, tmp_path: Path, way: str, engine: str) -> None:
    nproc, settings = ENGINES[engine]
    sections = {"checkpoint": {"save_every": 4}}
    path = write_config(tmp_path / "c.yaml", runs.config(way, tmp_path / "run", **sections))
    process = launch(path, "--nproc", str(nproc), *settings)
    wait_for(lambda: (tmp_path / "run/checkpoints/step-8").is_dir(), process)
    kill_all(process)
    run_cli("train", path, "--nproc", nproc, *settings, timeout=600)
    assert stream(tmp_path / "run") == stream(runs(way, engine))
