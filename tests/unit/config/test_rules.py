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
