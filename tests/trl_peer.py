"""The independent trainer that ours is compared with: TRL's SFTTrainer in a process of its own.

python -m tests.trl_peer SETTINGS.json     prints {"losses": [...], "ends": [...], "tokens": [...]} as its last line
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train_with_trl(settings: dict[str, Any], **environ: str) -> dict[str, Any]:
    """Losses and end times of the steps; `settings` as `_train` reads them."""
    import os

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "settings.json"
        path.write_text(json.dumps(settings))
        done = subprocess.run(
            [sys.executable, "-m", "tests.trl_peer", str(path)],
            capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, **environ},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """settings: model, data, template, out; args: of SFTConfig; lora: of LoraConfig and `adapter` to start from;
    threads."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(settings["threads"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = settings["template"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model.config.use_cache = False
    peft = LoraConfig(**settings["lora"], task_type="CAUSAL_LM") if settings.get("lora") else None
    if settings.get("adapter"):
        model, peft = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True), None
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    arguments = SFTConfig(
        settings["out"], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", **settings["args"],
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=[Clock()],
    )
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    if settings.get("save"):
        trainer.save_model(settings["save"])
    return {
        "losses": [record["loss"] for record in history],
        "norms": [record["grad_norm"] for record in history],
        "ends": ends,
        "rows": len(trainer.train_dataset),
    }


if __name__ == "__main__":
    print(json.dumps(_train(json.loads(Path(sys.argv[1]).read_text()))))
