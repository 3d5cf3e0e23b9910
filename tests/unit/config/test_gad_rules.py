"""Rules of recipe gad, and the names that its settings go by elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError

GAD: dict[str, Any] = {
    "recipe": "gad",
    "model": {"path": "./student"},
    "train": {"global_batch_size": 256},
    "schedule": {"warmup_steps": 0},
}


def load(*words: str) -> RunConfig:
    return load_config(GAD, words).config


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["model=none"], "recipe gad has no student", "add e.g. model.path="),
        (["global_batch_size=none"], "train.global_batch_size is not set", "set e.g. train.global_batch_size=256"),
        (["prompts_per_update=100"], "gad.prompts_per_update is 100", "use a divisor"),
        (["gad=adversarial"], "gad.stage adversarial has no warm-up", "set gad.warmup_run"),
        (["packing=concat"], "data.packing is concat", "use data.packing=documents"),
        (["fp16=true"], "train.precision is fp16", "use train.precision=bf16"),
        (["lora.r=4", "lora.dropout=0.1"], "lora.dropout is 0.1", "set lora.dropout=0"),
        (["lora.r=4", "rollout=vllm"], "rollout.engine is vllm", "use rollout.engine=transformers"),
        (["quantize=4bit"], "lora.quantize is 4bit", "set lora.quantize=none"),
        # settings that would have no effect
        (["seq_len=64"], "train.seq_len would have no effect", "take train.seq_len out"),
        (["total_steps=9"], "train.total_steps would have no effect", "take train.total_steps out"),
        (["gad.warmup_steps=5", "warmup_epochs=1"], "gad.warmup_epochs would have no effect", "take"),
        (["warmup_run=runs/a"], "gad.warmup_run would have no effect", "take"),
        (["tensor_parallel=2"], "rollout.tensor_parallel would have no effect", "take"),
        (["rollout=vllm", "batching=continuous"], "rollout.batching would have no effect", "take"),
        (["rollout=vllm", "url=http://a:1", "memory_share=0.5"], "rollout.memory_share would have no effect", "take"),
    ],
)  # fmt: skip
def test_what_gad_refuses(words: list[str], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "word", ["gad.kl_coef=0.1", "rollout.top_p=0.9", "prompt_field=chat", "num_prompts=9"]
)
def test_settings_of_gad_are_refused_elsewhere(word: str) -> None:
    sft = {"recipe": "sft", "model": {"path": "./m"}, "train": {"epochs": 1}}
    with pytest.raises(ConfigError, match="would have no effect"):
        load_config(sft, [word])


def test_names_of_other_tools() -> None:
    config = load(
        "data.prompt_key=chat", "data.max_prompt_length=2000", "data.max_response_length=1500",
        "data.train_batch_size=128", "data.val_batch_size=300", "ppo_mini_batch_size=64",
        "ppo_max_token_len_per_gpu=8192", "kl_loss_coef=0.01", "clip_ratio=0.1", "critic_warmup=3",
        "num_generations=4", "save_freq=50", "test_freq=25", "rollout.temperature=0.7",
    )  # fmt: skip
    data, gad = config.data, config.gad
    assert (data.prompt_field, data.max_prompt_tokens, data.max_response_tokens) == ("chat", 2000, 1500)
    assert (config.train.global_batch_size, config.eval.num_prompts) == (128, 300)
    assert (gad.prompts_per_update, gad.tokens_per_gpu, gad.kl_coef) == (64, 8192, 0.01)
    assert (gad.clip_range, gad.discriminator_only_steps) == (0.1, 3)
    assert (config.rollout.num_per_prompt, config.rollout.temperature) == (4, 0.7)
    assert (config.checkpoint.save_every, config.eval.every) == (50, 25)


def test_bare_names_keep_their_meaning() -> None:
    config = load_config({"train": {"total_steps": 90}}, ["warmup_steps=3", "temperature=0.5"]).config
    assert (config.schedule.warmup_steps, config.eval.temperature) == (3, 0.5)


SIZES = {
    "3b": (2, 12288, 256, 600, 0.7),
    "7b": (2, 12288, 256, 600, 0.7),
    "14b": (4, 8192, 128, 300, 0.8),
    "235b": (8, 4096, 64, 150, 0.9),
}


@pytest.mark.parametrize("size", SIZES)
def test_presets(size: str) -> None:
    """Per size as the requirements have it, and for all: rates, clip, KL, epochs, save and validate every 100."""
    config = load_config(f"gad_{size}").config
    rollout, gad = config.rollout, config.gad
    found = (rollout.tensor_parallel, gad.tokens_per_gpu, config.train.global_batch_size)
    assert (*found, config.eval.num_prompts, rollout.memory_share) == SIZES[size]
    assert (gad.warmup_epochs, gad.adversarial_epochs, gad.discriminator_only_steps) == (2, 4, 10)
    assert (config.optim.lr, gad.discriminator_lr, gad.kl_coef, gad.clip_range) == (1e-6, None, 0.001, 0.2)
    assert (rollout.num_per_prompt, rollout.temperature, rollout.top_p) == (8, 0.8, 1.0)
    assert (config.train.max_grad_norm, config.optim.weight_decay) == (0.2, 0.01)
    assert (config.checkpoint.save_every, config.eval.every) == (100, 100)
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (2048, 1536)
    assert gad.seqkd_lr == 5e-6
