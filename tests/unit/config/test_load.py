"""Precedence, origins, names and spellings of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.config.aliases import ALIASES, BARE, OBSOLETE, SECRETS, SECTION_VALUES, SWITCHES
from trainway.config.load import load_config
from trainway.config.names import field_table
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError

STEPS = {"train": {"total_steps": 1000}}


def load(source: object = STEPS, overrides: object = (), **environ: str) -> RunConfig:
    return load_config(source, overrides, environ=environ).config  # type: ignore[arg-type]


def refused(source: object = STEPS, overrides: object = (), **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides, **environ)
    return caught.value


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    file = write(
        tmp_path / "my.yaml", "extends: cpu_small\nname: mine\ntrain:\n  seq_len: 128\noptim:\n  lr: 5e-4\n"
    )
    loaded = load_config(file, ["optim.lr=1e-3"], environ={"RUN_EXPERIMENT": "trial"})
    config, origins = loaded.config, loaded.origins
    assert (config.train.total_steps, origins["train.total_steps"]) == (1000, "preset cpu_small")
    assert (config.train.seq_len, origins["train.seq_len"]) == (128, f"{file}:4")
    assert (config.name, origins["name"]) == ("trial", "environment RUN_EXPERIMENT")
    assert (config.optim.lr, origins["optim.lr"]) == (1e-3, "command line")
    assert (config.seed, origins["seed"]) == (42, "default")
    assert set(origins) == set(field_table())
    assert loaded.explicit == {"name", "train.seq_len", "optim.lr"}
    assert loaded.source_name == str(file)


def test_environment_knobs_set_the_directories() -> None:
    config = load(STEPS, TRAINWAY_RUNS_DIR="/data/runs", TRAINWAY_STORE_DIR="/data/cache", RUN_EXPERIMENT="")
    assert (config.runs_dir, config.data.store_dir, config.name) == ("/data/runs", "/data/cache", None)


def test_extends_is_relative_to_the_file_and_chains(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "a.yaml", "extends: m3_medium\ntrain: {seq_len: 256}\n")
    write(tmp_path / "base" / "b.yml", "extends: a.yaml\nseed: 3\n")
    file = write(tmp_path / "c.toml", 'extends = "base/b.yml"\n[optim]\nlr = 1e-3\n')
    loaded = load_config(file, environ={})
    assert loaded.config.model.hidden_size == 384
    assert (loaded.config.train.seq_len, loaded.config.seed, loaded.config.optim.lr) == (256, 3, 1e-3)
    assert loaded.origins["optim.lr"] == str(file)
    # what lies below is not this run's own word
    assert loaded.explicit == {"optim.lr"}


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    error = refused(tmp_path / "a.yaml")
    assert "circle" in error.what
    assert "a.yaml -> " in error.why


@pytest.mark.parametrize("value", ["3", "[a.yaml]", "''", "null"])
def test_extends_takes_one_name(tmp_path: Path, value: str) -> None:
    assert "`extends` is" in refused(write(tmp_path / "a.yaml", f"extends: {value}\n")).what


@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=0.002"],
        ["--optim.lr", "2e-3"],
        ["--optim.lr=2e-3"],
        ["lr=2e-3"],
        ["--lr", "2e-3"],
        ["learning_rate=.002"],
        ["--learning-rate", "2e-3"],
        ["optim.learning-rate=2e-3"],
    ],
)
def test_spellings_of_an_override(words: list[str]) -> None:
    assert load(STEPS, words).optim.lr == 0.002


def test_overrides_are_parsed_by_the_kind_of_their_setting() -> None:
    config = load(
        STEPS,
        [
            "name=2024-01-01",
            "data.train=a.txt,b.jsonl",
            "eval.prompts=[\"Hello, world\", 'it''s']",
            "optim.betas=0.8,0.9",
            "model.num_kv_heads=2",
            "eval.max_tokens=null",
            "train.total-steps=1_000",
            "data.shuffle=false",
            "run_dir=none",
            "engine.nproc=2",
        ],
    )
    assert config.name == "2024-01-01"
    assert config.data.train == ("a.txt", "b.jsonl")
    assert config.eval.prompts == ("Hello, world", "it's")
    assert config.optim.betas == (0.8, 0.9)
    assert config.model.num_kv_heads == 2
    assert config.eval.max_tokens is None
    assert config.train.total_steps == 1000
    assert config.data.shuffle is False
    assert config.run_dir is None
    assert config.engine.nproc == 2


def test_switches_need_no_value() -> None:
    assert load(STEPS, ["--compile", "--seed", "7"]).train.compile is True
    assert load(STEPS, ["--compile", "seed=7"]).seed == 7
    assert load(STEPS, ["--compile", "false"]).train.compile is False
    assert load(STEPS, ["--no-shuffle", "seed=7"]).data.shuffle is False
    assert load(STEPS, ["--bf16"]).train.precision == "bf16"


@pytest.mark.parametrize("words", [["foo"], ["-x"], ["--seed"], ["--seed", "--lr=1"], ["=3"], ["./a=1"]])
def test_words_that_are_no_setting(words: list[str]) -> None:
    assert refused(STEPS, words).what.startswith("command line: ")


def test_a_mapping_overrides_too() -> None:
    config = load_config("cpu_small", {"optim.lr": 1e-2, "train": {"seq_len": 64}}, environ={}).config
    assert (config.optim.lr, config.train.seq_len) == (1e-2, 64)


def test_an_ambiguous_bare_name_lists_what_it_may_mean() -> None:
    error = refused(STEPS, ["every=5"])
    assert error.why == "it may mean eval.every or log.every"
    assert "tokenizer.vocab_size" in refused(STEPS, ["vocab_size=500"]).why


@pytest.mark.parametrize(
    ("alias", "value", "key", "expected"),
    [
        ("per_device_train_batch_size", 4, "train.micro_batch_size", 4),
        ("batch_size", 4, "train.micro_batch_size", 4),
        ("gradient_accumulation_steps", 4, "train.grad_accum_steps", 4),
        ("learning_rate", 1e-3, "optim.lr", 1e-3),
        ("warmup_steps", 7, "schedule.warmup_steps", 7),
        ("lr_scheduler_type", "constant_with_warmup", "schedule.name", "constant"),
        ("lr_scheduler_type", "linear", "schedule.name", "linear"),
        ("weight_decay", 0.3, "optim.weight_decay", 0.3),
        ("adam_beta1", 0.8, "optim.betas", (0.8, 0.95)),
        ("adam_beta2", 0.999, "optim.betas", (0.9, 0.999)),
        ("adam_epsilon", 1e-6, "optim.eps", 1e-6),
        ("max_grad_norm", 0.5, "train.max_grad_norm", 0.5),
        ("logging_steps", 5, "log.every", 5),
        ("save_steps", 5, "checkpoint.save_every", 5),
        ("eval_steps", 5, "eval.every", 5),
        ("save_total_limit", 5, "checkpoint.keep_last", 5),
        ("output_dir", "out", "run_dir", "out"),
        ("run_name", "r", "name", "r"),
        ("report_to", "none", "tracking.report_to", ()),
        ("report_to", "tensorboard", "tracking.report_to", ("tensorboard",)),
        ("report_to", "all", "tracking.report_to", ("tensorboard", "wandb", "mlflow", "trackio")),
        ("run_name", "mine", "name", "mine"),
        ("wandb_project", "mine", "tracking.project", "mine"),
        ("tracking.run_name", "mine", "tracking.run_name", "mine"),
        ("block_size", 64, "train.seq_len", 64),
        ("max_seq_length", 64, "train.seq_len", 64),
        ("max_length", 64, "train.seq_len", 64),
        ("bf16", True, "train.precision", "bf16"),
        ("fp16", True, "train.precision", "fp16"),
        ("bf16", False, "train.precision", "fp32"),
        ("gradient_checkpointing", True, "train.activation_checkpointing", "full"),
        ("gradient_checkpointing", False, "train.activation_checkpointing", "none"),
        ("torch_compile", True, "train.compile", True),
        ("optim", "adamw_torch_fused", "optim.name", "adamw"),
        ("optim", "muon", "optim.name", "muon"),
        ("engine", "ddp", "engine.name", "ddp"),
        ("num_hidden_layers", 3, "model.num_layers", 3),
        ("num_attention_heads", 2, "model.num_heads", 2),
        ("num_key_value_heads", 2, "model.num_kv_heads", 2),
        ("tie_word_embeddings", False, "model.tie_embeddings", False),
        ("rms_norm_eps", 1e-6, "model.norm_eps", 1e-6),
        ("max_position_embeddings", 4096, "model.max_seq_len", 4096),
    ],
)
def test_names_of_other_tools(alias: str, value: object, key: str, expected: object) -> None:
    loaded = load_config({**STEPS, alias: value}, environ={})
    section, _, leaf = key.rpartition(".")
    assert getattr(getattr(loaded.config, section) if section else loaded.config, leaf) == expected
    assert loaded.origins[key] == "settings"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    again = load(STEPS, [f"--{alias.replace('_', '-')}={shown}"])
    assert getattr(getattr(again, section) if section else again, leaf) == expected


def test_every_alias_leads_to_a_setting_and_hides_none() -> None:
    leaves = {key.rpartition(".")[2] for key in field_table()}
    for alias, key in ALIASES.items():
        assert key.removesuffix(".0").removesuffix(".1") in field_table(), alias
        assert alias not in leaves, alias
    assert set(SWITCHES) <= set(ALIASES)
    assert {*SECTION_VALUES.values(), *BARE.values()} <= set(field_table())
    assert set(BARE) <= leaves
    assert not (set(OBSOLETE) | SECRETS) & (set(ALIASES) | leaves)


def test_other_tools_lengths_of_a_run() -> None:
    assert load({"num_train_epochs": 3, "max_steps": -1}).train.epochs == 3
    assert load({"max_steps": 50}).train.total_steps == 50


def test_bf16_and_fp16_are_one_setting() -> None:
    assert load({**STEPS, "bf16": False, "fp16": True}).train.precision == "fp16"
    assert load({**STEPS, "bf16": False, "fp16": False}).train.precision == "fp32"
    assert "both set train.precision" in refused({**STEPS, "bf16": True, "fp16": True}).why
    assert "true or false" in refused({**STEPS, "bf16": "maybe"}).why


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-3, "optim": {"lr": 2e-3}},
        {"batch_size": 4, "per_device_train_batch_size": 8},
        {"optim": {"betas": [0.9, 0.95]}, "adam_beta1": 0.8},
    ],
)
def test_two_spellings_that_disagree(settings: dict[str, object]) -> None:
    assert refused({**STEPS, **settings}).fix == "keep one of the two"


def test_two_spellings_that_agree() -> None:
    config = load(
        {**STEPS, "learning_rate": 1e-3, "optim": {"lr": 1e-3, "betas": [0.8, 0.9]}, "adam_beta1": 0.8}
    )
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.8, 0.9))


def test_one_beta_keeps_the_other_of_the_layers_below() -> None:
    config = load({**STEPS, "optim": {"betas": [0.8, 0.9]}}, ["adam_beta2=0.99", "optim.betas.0=0.7"])
    assert config.optim.betas == (0.7, 0.99)
    assert (
        "no setting" in refused(STEPS, ["optim.betas.7=0.5"]).what
        or "has 2 values" in refused(STEPS, ["optim.betas.7=0.5"]).why
    )


def test_obsolete_names_say_what_to_use() -> None:
    assert "eval.every" in refused({**STEPS, "evaluation_strategy": "steps"}).why
    assert "--resume" in refused(STEPS, ["--resume_from_checkpoint", "out/checkpoint-5"]).why
    # the answer, not that a value is missing
    assert "HF_HUB_OFFLINE" in refused(STEPS, ["--local-files-only"]).why


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.learning_rat", "optim.lr"),
        ("train.totl_steps", "train.total_steps"),
        ("trian.seq_len", "train.seq_len"),
        ("optm.name", "optim.name"),
        ("model.total_steps", "train.total_steps"),
        ("hiden_size", "model.hidden_size"),
        ("per_device_batch_size", "train.micro_batch_size"),
        ("train.learning_rate", "optim.lr"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, nearest: str) -> None:
    error = refused(STEPS, [f"{key}=1"])
    assert f"there is no setting {key!r}" in error.what
    assert nearest in error.fix


def test_a_section_is_not_a_value(tmp_path: Path) -> None:
    assert "data.train" in refused(STEPS, ["train=corpus.txt"]).fix
    assert refused({**STEPS, "model": 3}).what == "settings: model is 3"
    config = load_config(write(tmp_path / "a.yaml", "total_steps: 5\nmodel:\noptim: {}\n"), environ={}).config
    assert config.optim == RunConfig().optim


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = "train:\n  total_steps: 10\n  seq_len: 0\noptim:\n  lr: fast\n  nam: adamw\nlog:\n  level: loud\n"
    file = write(tmp_path / "bad.yaml", text)
    error = refused(file, ["engine.nproc=0"])
    assert error.what == "5 settings are wrong"
    for part in (
        f"{file}:3: train.seq_len is 0; it must be greater than 0",
        f"{file}:5: optim.lr is 'fast'; it must be",
        f"{file}:6: there is no setting 'optim.nam'",
        "did you mean optim.name?",
        f"{file}:8: log.level is 'loud'; it must be 'debug', 'info', 'warning' or 'error'",
        "command line: engine.nproc is 0; it must be greater than 0 or 'auto'",
    ):
        assert part in error.why, part


def test_one_problem_says_what_is_allowed() -> None:
    error = refused(STEPS, ["adam_epsilon=-1"])
    assert error.what == "command line: optim.eps (written adam_epsilon) is -1"
    assert error.why == "it must be greater than 0"
    assert error.fix == "AdamW's epsilon. Default: 1e-08."


def test_true_is_not_a_number() -> None:
    assert "not a switch" in refused({"train": {"total_steps": True}}).why


def test_unknown_presets_name_the_nearest() -> None:
    assert refused("runpod_3b").fix.startswith("did you mean 'runpod_")
    assert load("runpod-2b").model.hidden_size == 2560
