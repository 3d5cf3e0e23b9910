"""What users of other trainers write for fine-tuning, and what the reference launchers' flags mean here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.test_load import load, refused, write
from trainway.config.load import config_difference, dump_config, fingerprint, load_config
from trainway.config.resolved import flat_config
from trainway.errors import ConfigError
from trainway.planning.geometry import warmup_steps

SFT = {"recipe": "sft", "model": {"path": "org/model"}, "train": {"epochs": 1}}
TOKEN = "hf_" + "A1b2" * 9


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({"model_name_or_path": "a/b"}, "model.path", "a/b"),
        ({"base_model": "a/b"}, "model.path", "a/b"),
        ({"model": "a/b"}, "model.path", "a/b"),
        ({"model_local_dir": "/models/x"}, "model.path", "/models/x"),
        ({"tokenizer_local_dir": "/models/x"}, "tokenizer.path", "/models/x"),
        ({"attn_implementation": "flash_attention_2"}, "model.attention", "flash_attention_2"),
        ({"flash_attn": "fa2"}, "model.attention", "flash_attention_2"),
        ({"flash_attention": True}, "model.attention", "flash_attention_2"),
        ({"dataset_name": "org/chats"}, "data.train", ("org/chats",)),
        ({"dataset": ["a.jsonl", "b.jsonl"]}, "data.train", ("a.jsonl", "b.jsonl")),
        ({"data": ["a.jsonl", "b.jsonl"]}, "data.train", ("a.jsonl", "b.jsonl")),
        ({"data": "a.jsonl"}, "data.train", ("a.jsonl",)),
        ({"val_set_size": 0.1}, "data.val_ratio", 0.1),
        ({"packing": True}, "data.packing", "documents"),
        ({"packing": False}, "data.packing", "none"),
        ({"sample_packing": True}, "data.packing", "documents"),
        ({"packing_strategy": "bfd"}, "data.packing", "documents"),
        ({"assistant_only_loss": True}, "data.train_on", "assistant"),
        ({"completion_only_loss": True}, "data.train_on", "completion"),
        ({"train_on_inputs": False}, "data.train_on", "assistant"),
        ({"train_on_inputs": True}, "data.train_on", "all"),
        ({"excess_length_strategy": "drop"}, "data.over_length", "drop"),
        ({"max_seq_len": 1536}, "train.seq_len", 1536),
        ({"cutoff_len": 1024}, "train.seq_len", 1024),
        ({"sequence_len": 1024}, "train.seq_len", 1024),
        ({"batch": 3}, "train.micro_batch_size", 3),
        ({"micro_batch_size": 3}, "train.micro_batch_size", 3),
        ({"grad_accum": 128}, "train.grad_accum_steps", 128),
        ({"bf16": "auto"}, "train.precision", "auto"),
        ({"mixed_precision": "no"}, "train.precision", "fp32"),
        ({"torch_dtype": "bfloat16"}, "train.precision", "bf16"),
        ({"lr_scheduler": "linear"}, "schedule.name", "linear"),
        ({"optimizer": "adamw_torch"}, "optim.name", "adamw"),
        ({"backend": "ds"}, "engine.name", "zero3"),
        ({"backend": "fsdp"}, "engine.name", "fsdp"),
        ({"zero_stage": 2}, "engine.name", "zero2"),
        ({"fsdp": True}, "engine.name", "fsdp"),
        ({"backend": "ds", "deepspeed": "zero.json"}, "engine.ds_config", "zero.json"),
        ({"num_gpus": 4}, "engine.nproc", 4),
        ({"include_gpus": [0, 2]}, "engine.gpus", (0, 2)),
        ({"no_push_to_hub": True}, "release.push_to_hub", False),
        ({"no_evaluation": True}, "eval.after_training", False),
        ({"run_evaluation": False}, "eval.after_training", False),
        ({"log_level": "DEBUG"}, "log.level", "debug"),
        ({"log_batches": "all"}, "log.batches", "all"),
        ({"output": "/out/run"}, "run_dir", "/out/run"),
        ({"stage": "sft"}, "recipe", "sft"),
        ({"lora_r": 8}, "lora.r", 8),
        ({"lora_rank": 8}, "lora.r", 8),
        ({"lora_alpha": 16}, "lora.alpha", 16.0),
        ({"lora_dropout": 0.1}, "lora.dropout", 0.1),
        ({"lora_target_modules": ["q_proj"]}, "lora.target_modules", ("q_proj",)),
        ({"target_modules": "all-linear"}, "lora.target_modules", ("all-linear",)),
        ({"lora_target": "all"}, "lora.target_modules", ("all-linear",)),
        ({"lora_target_linear": True}, "lora.target_modules", ("all-linear",)),
        ({"target_parameters": ["7.mlp.experts.down_proj"]}, "lora.target_parameters", ("7.mlp.experts.down_proj",)),
        ({"lora_modules_to_save": ["lm_head"]}, "lora.modules_to_save", ("lm_head",)),
        ({"load_in_4bit": True}, "lora.quantize", "4bit"),
        ({"quantization_bit": 4}, "lora.quantize", "4bit"),
        ({"adapter": "qlora"}, "lora.quantize", "4bit"),
        ({"adapter": "lora"}, "lora.enabled", True),
        ({"use_peft": True}, "lora.enabled", True),
        ({"finetuning_type": "full"}, "lora.enabled", False),
        ({"lora": True}, "lora.enabled", True),
    ],
)  # fmt: skip
def test_names_of_other_trainers(settings: dict[str, object], key: str, expected: object) -> None:
    base = {k: v for k, v in SFT.items() if k != "model" or "model.path" not in key}
    base = {k: v for k, v in base.items() if (k, key) not in (("recipe", "recipe"), ("model", "model.path"))}
    section, _, leaf = key.rpartition(".")
    if "model" in settings or "model" not in base:
        base = {"recipe": "sft", "train.epochs": 1} | (
            {} if key == "model.path" else {"model.path": "org/model"}
        )
    if key == "recipe":
        base.pop("recipe", None)
    config = load({**base, **settings})
    assert getattr(getattr(config, section) if section else config, leaf) == expected
    if key.startswith("lora."):
        assert config.lora.enabled is (settings != {"finetuning_type": "full"})


def test_the_flags_of_the_full_fine_tuning_launcher() -> None:
    # S0's words, as they stand there
    words = (
        "--model openai/gpt-oss-20b --epochs 2 --learning_rate 2e-5 --batch_size 1 --grad_accum 128 "
        "--max_seq_len 2048 --bf16 --packing --gradient_checkpointing --save_steps 500 --eval_steps 500 "
        "--logging_steps 10"
    ).split()
    config = load({"recipe": "sft"}, words, TRAIN_BACKEND="ds")
    assert config.model.path == "openai/gpt-oss-20b"
    assert (config.train.epochs, config.optim.lr) == (2, 2e-5)
    assert (config.train.micro_batch_size, config.train.grad_accum_steps, config.train.seq_len) == (
        1,
        128,
        2048,
    )
    assert (config.train.precision, config.data.packing) == ("bf16", "documents")
    assert config.train.activation_checkpointing == "full"
    assert (config.checkpoint.save_every, config.eval.every, config.log.every) == (500, 500, 10)
    assert config.engine.name == "zero3"
    assert load({"recipe": "sft"}, words, TRAIN_BACKEND="fsdp").engine.name == "fsdp"


def test_the_flags_of_the_lora_framework() -> None:
    # S3's words: R34
    words = (
        "--model Qwen/Qwen2.5-3B-Instruct --data /data/ds.jsonl --output /out/run --lora --bf16 --epochs 1 "
        "--seq-len 512 --batch 1 --grad-accum 1 --lora-r 16 --lora-alpha 16 --lora-dropout 0.05 "
        "--target-modules q_proj k_proj v_proj o_proj --log-level DEBUG --log-batches all"
    ).split()
    config = load("lora_default", words)
    assert (config.model.path, config.data.train) == ("Qwen/Qwen2.5-3B-Instruct", ("/data/ds.jsonl",))
    assert (config.run_dir, config.train.seq_len, config.train.micro_batch_size) == ("/out/run", 512, 1)
    lora = config.lora
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout) == (True, 16, 16, 0.05)
    assert lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.log.level, config.log.batches) == ("debug", "all")
    # without --lora: full tuning
    assert load("lora_default", ["--no-lora"]).lora.enabled is False


def test_the_flags_and_knobs_of_the_lora_launcher() -> None:
    # R30
    words = "--num_gpus=4 --include_gpus=0,1,2,3 --no_push_to_hub --no_evaluation".split()
    config = load("gpt_oss_20b_lora", words)
    assert (config.engine.nproc, config.engine.gpus) == (4, (0, 1, 2, 3))
    assert (config.release.push_to_hub, config.eval.after_training) == (False, False)
    assert load("gpt_oss_20b_lora", ["--include_gpus", "1", "3"]).engine.gpus == (1, 3)
    loaded = load_config("gpt_oss_20b_lora", environ={"PUSH_TO_HUB": "false", "RUN_EVALUATION": "false"})
    assert (loaded.config.release.push_to_hub, loaded.config.eval.after_training) == (False, False)
    assert loaded.origins["eval.after_training"] == "environment RUN_EVALUATION"
    assert load("gpt_oss_20b_lora", RUN_EVALUATION="true").eval.after_training is True
    words = ["--hub_model_id", "ada/tuned", "--hub_private_repo", "false", "--license", "apache-2.0"]
    release = load("gpt_oss_20b_lora", words, PUSH_TO_HUB="true").release
    assert release.push_to_hub and (release.repo, release.private) == ("ada/tuned", False)
    assert (release.licence, release.tag, release.which) == ("apache-2.0", "v0.1", "best")
    assert load("gpt_oss_20b_lora", ["--push_to_hub", *words]).release == release
    assert "release.repo is empty" in refused("gpt_oss_20b_lora", PUSH_TO_HUB="true").what
    obsolete = str(refused("gpt_oss_20b_lora", ["--hub_strategy", "end"]))
    assert "set release.which" in obsolete


def test_packing_is_a_switch_and_a_word() -> None:
    for words, expected in (
        (["--packing"], "documents"),
        (["--packing", "--lora"], "documents"),
        (["--packing", "none"], "none"),
        (["--packing", "false"], "none"),
        (["--no-packing"], "none"),
        (["packing=true"], "documents"),
        (["--packing", "seed=3"], "documents"),
    ):
        assert load(SFT, words).data.packing == expected, words


def test_any_setting_of_lora_turns_it_on_unless_it_is_turned_off() -> None:
    assert load(SFT).lora.enabled is False
    loaded = load_config(SFT, ["lora.r=8"], environ={})
    assert (loaded.config.lora.enabled, loaded.config.lora.r) == (True, 8)
    assert loaded.origins["lora.enabled"] == "command line"
    # the layer itself says otherwise
    error = refused({**SFT, "lora": {"enabled": False, "r": 8}})
    assert error.what == "settings: lora.r would have no effect"
    assert error.why == "lora.enabled is false"
    # a higher layer says otherwise, and takes the lower one's settings with it
    config = load({**SFT, "lora": {"r": 8}}, ["lora=false"])
    assert config.lora.enabled is False
    assert "r: 8" not in dump_config(config)
    # and one above turns it on again
    assert load({**SFT, "lora": False}, ["lora_alpha=4"]).lora.enabled is True
    assert load("gpt_oss_20b_lora", ["--no-lora"]).lora.enabled is False


def test_a_switch_that_is_off_asks_for_no_adapters() -> None:
    assert load({**SFT, "load_in_4bit": False}).lora.enabled is False
    assert load({**SFT, "lora": {"quantize": "none"}}).lora.enabled is False
    assert load({**SFT, "lora_target_linear": False}).lora.enabled is False


def test_tables_keep_the_dots_of_their_keys(tmp_path: Path) -> None:
    expected = {"layers.7.self_attn.q_proj": 32, "^model-x.*down_proj$": 4}
    yaml = "recipe: sft\nmodel.path: a/b\nepochs: 1\nlora:\n  rank-pattern:\n"
    yaml += "".join(f'    "{key}": {value}\n' for key, value in expected.items())
    loaded = load_config(write(tmp_path / "a.yaml", yaml), environ={})
    assert loaded.config.lora.rank_pattern == expected
    assert loaded.config.lora.enabled is True
    assert loaded.origins["lora.rank_pattern"] == f"{tmp_path / 'a.yaml'}:5"
    toml = 'recipe = "sft"\nmodel.path = "a/b"\ntrain.epochs = 1\n[lora.rank_pattern]\n'
    toml += "".join(f'"{key}" = {value}\n' for key, value in expected.items())
    assert load(write(tmp_path / "a.toml", toml)).lora.rank_pattern == expected
    assert load({**SFT, "rank_pattern": expected}).lora.rank_pattern == expected
    word = 'lora.rank_pattern={"layers.7.self_attn.q_proj": 32, "^model-x.*down_proj$": 4}'
    config = load(SFT, [word, "--alpha_pattern", "{q_proj: 8}"])
    assert config.lora.rank_pattern == expected
    assert config.lora.alpha_pattern == {"q_proj": 8.0}


def test_a_table_replaces_the_one_below_and_survives_a_dump(tmp_path: Path) -> None:
    base = {**SFT, "lora": {"rank_pattern": {"q_proj": 8}}}
    config = load(base, ["lora.rank_pattern={k_proj.x: 2}"])
    assert config.lora.rank_pattern == {"k_proj.x": 2}
    again = load(write(tmp_path / "dump.yaml", dump_config(config)))
    assert again.lora == config.lora
    assert config_difference(fingerprint(config), fingerprint(again)) == []
    assert flat_config(config)["lora.rank_pattern"] == {"k_proj.x": 2}


def test_a_table_has_values_of_its_kind() -> None:
    error = refused(SFT, ["lora.rank_pattern={q_proj: 0}"])
    assert error.what == "command line: lora.rank_pattern is {'q_proj': 0}"
    assert error.why == "it must be greater than 0"
    assert "it must be" in refused(SFT, ["lora.rank_pattern=8"]).why
    assert "nan" in refused({**SFT, "lora": {"alpha_pattern": {"q": float("nan")}}}).what


@pytest.mark.parametrize(
    "words",
    [
        ["--hf_token", TOKEN],
        [f"--hf_token={TOKEN}"],
        ["--hf-token", "short"],
        ["hub_token=abc-secret-xyz"],
        ["--token", TOKEN, "--seed", "3"],
        ["run_name=" + TOKEN],
        ["--run_name", TOKEN],
        ["seed=not-a-number", "--hf_token", TOKEN],
    ],
)
def test_a_token_on_the_command_line_is_refused_and_not_repeated(words: list[str]) -> None:
    # R30, X11
    error = refused(SFT, words)
    assert "is a secret, not a setting" in error.what
    assert error.why == "every user of this machine can read a command line, and shells keep it"
    assert error.fix.startswith("set HF_TOKEN or run `hf auth login` instead; then revoke")
    for value in (TOKEN, "short", "abc-secret-xyz"):
        assert value not in f"{error} {error.__context__}"


def test_a_token_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.yaml", f"epochs: 1\nhub_token: {TOKEN}\n"))
    assert error.what == f"{tmp_path / 'a.yaml'}:2: hub_token is a secret, not a setting"
    assert error.fix == "set HF_TOKEN or run `hf auth login` instead"
    assert TOKEN not in str(error)
    assert "WANDB_API_KEY" in refused({**SFT, "wandb_api_key": "k"}).fix


def test_a_preset_by_its_name_with_dashes() -> None:
    assert load("gpt-oss-20b-full") == load("gpt_oss_20b_full")


def test_a_share_of_warm_up_displaces_the_steps_of_a_lower_layer() -> None:
    config = load_config("m3_medium", ["warmup_ratio=0.1", "total_steps=1000"]).config
    assert config.schedule.warmup_ratio == 0.1
    assert warmup_steps(config.schedule, 1000) == 100
    back = load_config("lora_default", ["warmup_steps=7"]).config.schedule
    assert (back.warmup_ratio, back.warmup_steps) == (None, 7)
    with pytest.raises(ConfigError, match="warmup_steps would have no effect"):
        load_config("m3_medium", ["warmup_ratio=0.1", "warmup_steps=5"])
