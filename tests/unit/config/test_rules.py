"""What must hold between settings, and what a higher layer displaces."""

from __future__ import annotations

import pytest

from tests.unit.config.test_load import STEPS, load, refused
from trainway.config.load import load_config


def test_a_run_has_exactly_one_length() -> None:
    assert refused({}).what == "the length of the run is not set"
    assert "decides the length" in refused({"train": {"total_steps": 5, "epochs": 1}}).why
    assert "decides the length" in refused({}, ["epochs=1", "max_steps=5"]).why


def test_the_higher_layers_length_displaces_the_lower() -> None:
    config = load("cpu_small", ["epochs=2"])
    assert (config.train.total_steps, config.train.epochs) == (None, 2)
    config = load({"train": {"epochs": 2}}, ["total_steps=500"])
    assert (config.train.total_steps, config.train.epochs) == (500, None)


def test_the_higher_layers_batch_displaces_the_lower() -> None:
    config = load("runpod_2b", ["global_batch_size=512"])
    assert (config.train.global_batch_size, config.train.grad_accum_steps) == (512, None)
    config = load("runpod_1b", ["gradient_accumulation_steps=2"])
    assert (config.train.global_batch_size, config.train.grad_accum_steps) == (None, 2)
    config = load({**STEPS, "global_batch_size": 16, "grad_accum_steps": 2})
    assert (config.train.global_batch_size, config.train.grad_accum_steps) == (16, 2)


def test_rows_fit_the_model() -> None:
    error = refused(STEPS, ["seq_len=4096"])
    assert "model.max_seq_len = 2048 (default)" in error.why
    assert error.fix.startswith("set model.max_seq_len=4096")
    assert load(STEPS, ["seq_len=2048"]).train.seq_len == 2048


def test_heads_divide_the_width() -> None:
    assert refused(STEPS, ["hidden_size=250"]).fix == "use 248 or 252, or set model.head_dim"
    assert load(STEPS, ["hidden_size=250", "head_dim=64"]).model.head_dim == 64
    assert refused(STEPS, ["num_kv_heads=3"]).fix == "use one of 1, 2, 4"
    assert "must be even" in refused(STEPS, ["head_dim=63"]).why


def test_the_warmup_ends_before_the_run() -> None:
    error = refused({"train": {"total_steps": 10}, "schedule": {"warmup_steps": 10}})
    assert error.why == "the run has only 10 steps (settings)"


def test_the_decay_of_wsd_begins_after_the_warmup() -> None:
    schedule = {"name": "wsd", "warmup_steps": 60, "decay_ratio": 0.5}
    error = refused({"train": {"total_steps": 100}, "schedule": schedule})
    assert error.what.startswith("settings: schedule.warmup_steps 60 and the 50 steps")
    assert error.fix == "set schedule.warmup_steps=10 or schedule.decay_ratio=0.4, or train for more steps"
    assert load({"train": {"total_steps": 120}, "schedule": schedule}).schedule.decay_ratio == 0.5


def test_a_shortened_run_shortens_a_warmup_that_the_user_did_not_set() -> None:
    # R26: a preset's 400,000 steps are easily shortened for a smoke run
    loaded = load_config("runpod_1b", ["total_steps=50"], environ={})
    assert loaded.config.schedule.warmup_steps == 5
    assert loaded.origins["schedule.warmup_steps"] == "train.total_steps / 10 (preset runpod_1b: 2000)"
    assert load("runpod_1b", ["total_steps=5000"]).schedule.warmup_steps == 2000


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["muon_lr=0.1"], "optim.name is adamw"),
        (["muon_momentum=0.9"], "optim.name is adamw"),
        (["schedule=constant", "min_lr_ratio=0.2"], "schedule.name is constant"),
        (["schedule=cosine", "decay_ratio=0.3"], "schedule.name is cosine"),
        (["schedule=linear", "decay_shape=linear"], "schedule.name is linear"),
        (["tokenizer.path=tok", "tokenizer.vocab_size=500"], "no tokenizer is trained"),
        (["tokenizer.path=tok", "special_tokens=<|a|>"], "no tokenizer is trained"),
        (["tokenizer.path=tok", "sample_mib=5"], "no tokenizer is trained"),
        (["validation=v.txt", "val_ratio=0.1"], "data.validation is set"),
        (["num_samples=0", "temperature=1"], "no samples are made"),
        (["prompts=a", "num_samples=2"], "eval.prompts is set"),
        (["on_nonfinite=stop", "max_skipped_steps=3"], "no step is ever left out"),
        (["engine=single", "timeout_s=9"], "engine.name is single"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(words: list[str], reason: str) -> None:
    error = refused(STEPS, words)
    assert "would have no effect" in error.what
    assert reason in error.why


def test_a_presets_own_settings_may_become_pointless() -> None:
    assert load("runpod_1b", ["tokenizer.path=tok"]).tokenizer.vocab_size == 32000
    assert load("cpu_small", ["validation=v.txt"]).data.val_ratio == 0.05


def test_one_process_is_not_two() -> None:
    assert "one process" in refused(STEPS, ["engine=single", "nproc=2"]).why
    assert load(STEPS, ["engine=single", "nproc=1"]).engine.nproc == 1


SFT = {"recipe": "sft", "model": {"path": "org/model"}, "train": {"epochs": 1}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_sft_starts_from_a_model() -> None:
    error = refused({"recipe": "sft", "train": {"epochs": 1}})
    assert error.what == "settings: recipe sft has no model to start from"
    assert load(SFT).model.path == "org/model"


def test_a_model_brings_its_own_lengths() -> None:
    assert load(SFT, ["seq_len=8192"]).train.seq_len == 8192
    assert load({**SFT, "recipe": "pretrain"}).model.path == "org/model"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["hidden_size=512"], "model.path is set: the shape is that of the model"),
        (["model.max_seq_len=4096"], "model.path is set: the shape is that of the model"),
        (["tie_embeddings=false"], "model.path is set: the shape is that of the model"),
        (["tokenizer.vocab_size=500"], "a tokenizer comes along, so no tokenizer is trained"),
        (["special_tokens=<|a|>"], "a tokenizer comes along, so no tokenizer is trained"),
        (["model.path=/models/a", "revision=main"], "model.path is a directory, which has no revisions"),
        (["lora=false", "lora.r=8"], "lora.enabled is false"),
        (["recipe=pretrain", "chat_template=chatml"], "it reads documents, not conversations"),
        (["recipe=pretrain", "train_on=all"], "it reads documents, not conversations"),
        (["recipe=pretrain", "over_length=drop"], "it reads documents, not conversations"),
        (["ds_config=a.json"], "this is for DeepSpeed: zero2 or zero3"),
        (["engine=fsdp", "ds_config=a.json"], "this is for DeepSpeed: zero2 or zero3"),
        (["engine=ddp", "cpu_offload=all"], "keeps the whole model on each device"),
        (["engine=zero3", "sharding=hybrid"], "engine.name is zero3"),
        (["engine=zero2", "reshard_after_forward=false"], "engine.name is zero2"),
        (["engine=fsdp", "shard_ranks=4"], "engine.sharding is full"),
    ],
)
def test_a_setting_of_tuning_that_would_be_ignored_is_refused(words: list[str], reason: str) -> None:
    error = refused(SFT, words)
    assert "would have no effect" in error.what
    assert reason in error.why


@pytest.mark.parametrize("word", ["revision=main", "trust_remote_code=true", "attention=eager"])
def test_settings_of_a_model_that_is_not_there(word: str) -> None:
    assert "model.path is empty" in refused(STEPS, [word]).why


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["packing=concat"], "data.packing is concat", "use data.packing=documents, or none"),
        (["recipe=pretrain", "packing=none"], "data.packing is none", "use data.packing=documents, or recipe=sft"),
        (
            ["lora.dropout=0.1", "target_parameters=7.mlp.experts.down_proj"],  # X10
            "lora.dropout is 0.1",
            "set lora.dropout=0",
        ),
        (["use_dora=true", "target_parameters=a.b"], "lora.use_dora with lora.target_parameters", "take one of the two out"),
        (["quantize=4bit", "engine=fsdp"], "lora.quantize is 4bit", "use engine.name=ddp, or lora.quantize=none"),
        (["quantize=4bit", "engine=zero3"], "lora.quantize is 4bit", "use engine.name=ddp, or lora.quantize=none"),
        (["quantize=4bit", "use_dora=true"], "lora.use_dora with lora.quantize=4bit", "turn one of them off"),
        (["target_modules=[]"], "lora.target_modules and lora.target_parameters are empty", "name at least one, e.g."),
        (["optim=muon", "engine=zero2"], "optim.name is muon", "use engine.name=fsdp, or optim.name=adamw"),
        (["optim=muon", "engine=zero3"], "optim.name is muon", "use engine.name=fsdp, or optim.name=adamw"),
        (["fp16=true", "engine=zero2"], "train.precision is fp16", "use train.precision=bf16 or fp32"),
        (["compile=true", "engine=zero3"], "train.compile is true", "use train.compile=false"),
        (["engine=fsdp", "cpu_offload=optimizer"], "engine.cpu_offload is optimizer", "use engine.cpu_offload=all"),
        (["engine=zero2", "cpu_offload=all"], "engine.cpu_offload is all", "use engine.cpu_offload=optimizer"),
        (["push_to_hub=true"], "release.push_to_hub is on, and release.repo is empty", "set release.repo=OWNER/NAME"),
        (["release.merge=true", "lora.enabled=false"], "release.merge is on without lora", "take it out"),
        (["release.merge=true", "lora.enabled=true", "quantize=4bit"], "release.merge is on, and lora.quantize is 4bit", "release the adapter"),
        (["gpus=0,1", "nproc=4"], "engine.gpus names 2 (0, 1), for 4 processes", "name as many GPUs as processes"),
        (["gpus=0,1,2", "nproc=2"], "engine.gpus names 3 (0, 1, 2), for 2", "name as many GPUs as processes"),
        (["gpus=0,1", "engine=single"], "engine.gpus names 2 (0, 1), for 1 processes", "name as many GPUs"),
        (["gpus=1,1"], "engine.gpus is 1, 1", "name each once"),
        (["trust_remote_code=true"], "model.trust_remote_code runs code that may change tomorrow", "read the code"),
        (["trust_remote_code=true", "revision=main"], "model.trust_remote_code runs", "read the code of one commit"),
    ],
)  # fmt: skip
def test_contradictions_of_tuning(words: list[str], what: str, fix: str) -> None:
    error = refused(SFT, words)
    assert error.what.startswith(f"command line: {what}")
    assert error.fix.startswith(fix)


@pytest.mark.parametrize(
    "words",
    [
        ["trust_remote_code=true", f"revision={COMMIT}"],
        ["model.path=./model", "trust_remote_code=true"],
        ["engine=zero3", "cpu_offload=all"],
        ["engine=zero2", "cpu_offload=optimizer"],
        ["engine=fsdp", "cpu_offload=all", "optim=muon"],
        ["engine=zero3", "ds_config=a.json"],
        ["gpus=0,3", "nproc=2"],
        ["gpus=2"],
        ["lora.dropout=0.1"],
        ["target_modules=[]", "modules_to_save=lm_head"],
        ["z_loss=1e-4", "packing=none", "train_on=completion", "over_length=error"],
        ["tokenizer.path=other"],
    ],
)
def test_what_goes_together(words: list[str]) -> None:
    assert load(SFT, words).recipe == "sft"


def test_lora_needs_a_model() -> None:
    assert "a new model has nothing worth freezing" in refused(STEPS, ["lora=true"]).why
