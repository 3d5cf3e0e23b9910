"""The shipped presets are what the documentation says."""

from __future__ import annotations

import pytest

from tests.unit.config.test_load import load
from trainway.config.load import load_config
from trainway.config.mixes import train_sources
from trainway.config.source import preset_descriptions, preset_names, preset_text
from trainway.planning.arithmetic import count_parameters
from trainway.planning.geometry import describe_plan, plan_memory, planned_shape, resolve_geometry


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_described(name: str) -> None:
    config = load(name)
    assert config.description.endswith(".")
    assert preset_descriptions()[name] == config.description
    assert resolve_geometry(config, 1).total_steps == config.train.total_steps
    assert preset_text(name.replace("_", "-")) == preset_text(name)


@pytest.mark.parametrize(
    ("name", "total", "hidden", "layers", "heads"),
    [
        ("cpu_small", 5_868_800, 256, 6, 4),
        ("m3_medium", 22_026_624, 384, 8, 6),  # R24: 22M
        ("runpod_1b", 1_030_309_888, 2048, 20, 32),
        ("runpod_2b", 1_961_617_920, 2560, 24, 40),  # R25: 1.97B within 1 %
        ("runpod_4b", 3_722_382_336, 3072, 32, 48),
    ],
)
def test_sizes(name: str, total: int, hidden: int, layers: int, heads: int) -> None:
    config = load(name)
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (
        hidden,
        layers,
        heads,
    )
    assert describe_plan(config)["parameters"]["total"] == total
    assert count_parameters(config.model, config.tokenizer.vocab_size).total == total


def test_cloud_presets() -> None:
    two, four = load("runpod_2b"), load("runpod_4b")
    assert (two.train.micro_batch_size, two.train.grad_accum_steps, two.train.precision) == (
        2,
        64,
        "bf16",
    )  # R25
    assert (four.train.micro_batch_size, four.train.grad_accum_steps) == (1, 256)  # R25
    assert four.train.activation_checkpointing == "full"
    for name in ("runpod_1b", "runpod_2b", "runpod_4b"):
        config = load(name)
        assert (config.schedule.name, config.train.total_steps, config.train.seq_len) == (
            "cosine",
            400_000,
            2048,
        )  # R26
        assert config.data.train == (f"/workspace/datasets/train/{name.replace('_', '-')}",)
        assert (config.runs_dir, config.data.store_dir) == ("/workspace/runs", "/workspace/cache")


GPU_80GB = 80e9
"""Bytes of an A100 or H100 with 80 GB, less what the allocator and the CUDA context take."""
H200 = 141e9


def test_full_fine_tuning_of_gpt_oss_20b() -> None:
    config = load("gpt_oss_20b_full")
    train = config.train
    assert (config.recipe, config.model.path, config.lora.enabled) == (
        "sft",
        "openai/gpt-oss-20b",
        False,
    )  # X1
    assert (train.epochs, config.optim.lr, train.seq_len, train.precision) == (2, 2e-5, 2048, "bf16")  # R27
    assert (train.micro_batch_size, train.grad_accum_steps) == (1, 128)  # R27
    assert (config.data.packing, train.activation_checkpointing) == ("documents", "full")  # R27
    assert (config.checkpoint.save_every, config.eval.every, config.log.every) == (500, 500, 10)  # R27
    assert config.engine.name == "zero3"  # R28
    assert config.data.over_length == "truncate"  # X7: the oldest turns go
    sources = [(source.path, source.optional) for source in train_sources(config.data)]
    required = [(f"out/{name}.sft.jsonl", False) for name in ("chatgpt", "epub", "memories", "sent")]
    assert sources == [*required, ("out/books.sft.jsonl", True)]  # R16
    assert resolve_geometry(config, 4).global_batch_size == 512


def test_full_fine_tuning_fits_four_gpus_only_with_what_it_offloads() -> None:
    config = load("gpt_oss_20b_full")
    shape, geometry = planned_shape(config), resolve_geometry(config, 4)
    assert shape is not None
    memory = plan_memory(config, shape, geometry)
    assert config.engine.cpu_offload == "optimizer"
    assert memory.total < GPU_80GB / 2
    # fp32 copy, two moments and gradients of a quarter of 20.9B
    assert memory.host == 16 * 20_914_757_184 // 4
    kept = plan_memory(load("gpt_oss_20b_full", ["cpu_offload=none"]), shape, geometry)
    assert kept.total > GPU_80GB


def test_the_engine_is_chosen_by_one_word() -> None:
    # R28: and what was offloaded for ZeRO-3 is as FSDP can do it
    loaded = load_config("gpt_oss_20b_full", ["engine=fsdp"], environ={})
    assert (loaded.config.engine.name, loaded.config.engine.cpu_offload) == ("fsdp", "all")
    assert loaded.origins["engine.cpu_offload"] == "engine.name is fsdp (preset gpt_oss_20b_full: optimizer)"
    assert load("gpt_oss_20b_full", TRAIN_BACKEND="fsdp").engine.cpu_offload == "all"
    assert load("gpt_oss_20b_full", ["engine=ddp"]).engine.name == "ddp"
    assert load("gpt_oss_20b_lora", ["engine=zero3"]).engine.name == "zero3"  # R33


def test_lora_of_gpt_oss_20b() -> None:
    config = load("gpt_oss_20b_lora")
    train, lora = config.train, config.lora
    assert (config.recipe, config.model.path, lora.enabled) == ("sft", "openai/gpt-oss-20b", True)
    assert (config.optim.lr, train.epochs, train.seq_len) == (2e-4, 1, 2048)  # R31
    assert (train.micro_batch_size, train.grad_accum_steps) == (2, 8)  # R31
    assert resolve_geometry(config, 4).global_batch_size == 64  # R31
    assert config.data.train == ("HuggingFaceH4/Multilingual-Thinking",)  # R31
    assert (lora.r, lora.alpha, lora.dropout) == (8, 16, 0)  # R32, X10
    experts = ("gate_up_proj", "down_proj")
    assert lora.target_parameters == tuple(
        f"{layer}.mlp.experts.{name}" for layer in (7, 15, 23) for name in experts
    )  # R32
    assert (config.engine.name, train.precision) == ("zero2", "bf16")  # R33
    parameters = describe_plan(config, 4)["parameters"]
    assert parameters["trainable"] == 15_040_512
    assert round(100 * parameters["trainable"] / parameters["total"], 1) == 0.1  # R32: about 0.1 %
    assert describe_plan(config, 4)["memory_bytes"]["total"] < H200 / 3
    assert resolve_geometry(config, 4, 990).total_steps == 15  # 1,000 conversations less those held out


def test_lora_of_any_model() -> None:
    config = load("lora_default")
    assert (config.recipe, config.lora.enabled, config.train.precision) == ("sft", True, "auto")  # R34
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")  # R34
    assert (config.schedule.name, config.schedule.warmup_steps > 0) == ("linear", True)  # R35
    assert (config.data.packing, config.data.shuffle) == ("none", True)  # R35: dynamic padding, reshuffled
    assert config.checkpoint.save_each_epoch is True  # R44
    # 36 layers of r 16: q and o 2048 + 2048, k and v 2048 + 256
    assert describe_plan(config)["parameters"]["trainable"] == 36 * 16 * (2 * 4096 + 2 * 2304)


def test_small_presets_fit_a_laptop() -> None:
    for name in ("sft_small", "lora_small"):
        config = load(name)
        assert config.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        plan = describe_plan(config, half_precision=False)
        assert plan["parameters"]["total"] == 134_515_008
        assert plan["memory_bytes"]["total"] < 4 * 2**30
