"""An independent trainer agrees: TRL's SFTTrainer on a real model and real conversations, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import metrics, run_cli, write_config
from tests.real_conversations import MARKED_CHATML, real_conversations
from tests.real_models import smollm2_or_skip
from tests.trl_peer import train_with_trl
from trainway.release.bundle import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS, ROWS_PER_STEP = 30, 4
LORA: dict[str, Any] = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 real conversations of at most 700 characters, so that none is cut and a step takes seconds."""
    rows = [json.loads(line) for line in real_conversations().read_text().splitlines()]
    short = [row for row in rows if sum(len(turn["content"]) for turn in row["messages"]) <= 700]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in short[:200]))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "marked.jinja"
    path.write_text(MARKED_CHATML)
    return path


@pytest.mark.parametrize("way", ["full", "lora"])
def test_losses_equal_those_of_trl(tmp_path: Path, chats: Path, template: Path, way: str) -> None:
    model = smollm2_or_skip()
    config: dict[str, Any] = {
        "recipe": "sft",
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "data": {
            "train": [str(chats)],
            "validation": [str(chats)],
            "store_dir": str(tmp_path / "store"),
            "packing": "none",
            "shuffle": False,
            "chat_template": str(template),
        },
        "train": {
            "total_steps": STEPS,
            "seq_len": 512,
            "micro_batch_size": 2,
            "grad_accum_steps": ROWS_PER_STEP // 2,
            "precision": "fp32",
            "max_grad_norm": 1.0,
        },
        "optim": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "checkpoint": {"save_every": 1000},
        "eval": {"every": 1000, "max_tokens": 512, "num_samples": 0},
    }
    peer: dict[str, Any] = {
        "model": str(model),
        "data": str(chats),
        "template": MARKED_CHATML,
        "out": str(tmp_path / "trl"),
        "threads": 2,
        "args": {
            "max_length": 512,
            "packing": False,
            "assistant_only_loss": True,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": ROWS_PER_STEP // 2,
            "learning_rate": 1e-4,
            "adam_beta2": 0.999,
            "weight_decay": 0.01,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
            "train_sampling_strategy": "sequential",
        },
    }
    if way == "lora":
        config["lora"] = LORA
        # one step at a rate of next to nothing gives the adapter that our run begins with
        first = {
            **config,
            "run_dir": str(tmp_path / "first"),
            "optim": {**config["optim"], "lr": 1e-30, "weight_decay": 0},
        }
        first["train"] = {**config["train"], "total_steps": 1}
        run_cli("train", write_config(tmp_path / "first.yaml", first), timeout=900)
        peer["adapter"] = str(export(tmp_path / "first", tmp_path / "adapter", which="latest"))
    run_cli("train", write_config(tmp_path / "c.yaml", config), timeout=1800)
    theirs = train_with_trl(peer)
    ours = [record["train/loss"] for record in metrics(tmp_path / "run")]
    assert len(ours) == len(theirs["losses"]) == STEPS
    assert ours == pytest.approx(theirs["losses"], rel=1e-4)
    norms = [record["optim/grad_norm"] for record in metrics(tmp_path / "run")]
    assert norms == pytest.approx(theirs["norms"], rel=1e-3)
