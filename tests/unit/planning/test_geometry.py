"""Batches, steps and epochs from a configuration and a number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainway.config.schema import EngineConfig, RunConfig
from trainway.errors import ConfigError
from trainway.planning.geometry import (
    decay_steps,
    describe_plan,
    planned_ranks,
    planned_vocab_size,
    resolve_geometry,
    shard_count,
)


def config(**train: object) -> RunConfig:
    train = {"epochs": 1} | train if "total_steps" not in train else train
    return RunConfig.model_validate(
        {"train": {"micro_batch_size": 8, "seq_len": 512, **train}, "schedule": {"warmup_steps": 0}}
    )


def test_the_global_batch_decides_the_accumulation() -> None:
    geometry = resolve_geometry(config(global_batch_size=128, total_steps=10), 4)
    assert (geometry.grad_accum_steps, geometry.global_batch_size, geometry.tokens_per_step) == (
        4,
        128,
        65536,
    )
    assert (geometry.world_size, geometry.micro_batch_size, geometry.seq_len) == (4, 8, 512)
    assert (geometry.total_steps, geometry.steps_per_epoch, geometry.epochs) == (10, None, None)


def test_the_accumulation_decides_the_global_batch() -> None:
    assert resolve_geometry(config(grad_accum_steps=3), 2).global_batch_size == 48
    assert resolve_geometry(config(), 2).global_batch_size == 16


def test_a_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_geometry(config(global_batch_size=100), 4)
    assert "100 is not divisible by 8 rows x 4 ranks" in caught.value.what
    assert "train.global_batch_size=96 or 128" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        resolve_geometry(config(global_batch_size=4), 1)
    assert "train.global_batch_size=8," in caught.value.fix


def test_batch_and_accumulation_must_agree() -> None:
    assert resolve_geometry(config(global_batch_size=64, grad_accum_steps=4), 2).grad_accum_steps == 4
    with pytest.raises(ConfigError, match="disagrees") as caught:
        resolve_geometry(config(global_batch_size=64, grad_accum_steps=4), 1)
    assert caught.value.why == "8 rows x 4 x 1 ranks = 32"


@pytest.mark.parametrize(("batch", "steps"), [(256, 1102), (128, 2203), (64, 4406)])
def test_steps_follow_from_rows(batch: int, steps: int) -> None:
    # X4: 282K rows
    geometry = resolve_geometry(config(global_batch_size=batch), 8, 282_000)
    assert (geometry.steps_per_epoch, geometry.total_steps, geometry.epochs) == (steps, steps, 1)
    assert resolve_geometry(config(global_batch_size=batch, epochs=2), 8, 282_000).total_steps == round(
        564_000 / batch
    )


def test_epochs_follow_from_steps() -> None:
    geometry = resolve_geometry(config(total_steps=100), 1, 400)
    assert (geometry.steps_per_epoch, geometry.epochs) == (50, 2.0)
    assert resolve_geometry(config(epochs=0.5), 1, 3).total_steps == 1
    assert resolve_geometry(config(), 1).total_steps is None


def test_what_cannot_be_a_run() -> None:
    for ranks, rows, what in ((0, None, "number of ranks"), (1, 0, "no rows")):
        with pytest.raises(ConfigError, match=what):
            resolve_geometry(config(), ranks, rows)
    short = RunConfig.model_validate({"train": {"epochs": 1}, "schedule": {"warmup_steps": 50}})
    with pytest.raises(ConfigError) as caught:
        resolve_geometry(short, 1, 240)
    assert caught.value.why == "the run has only 30 steps of 8 rows"
    assert caught.value.fix.startswith("set schedule.warmup_steps=3")


def test_wsd_decays_after_its_warm_up() -> None:
    def wsd(warmup_steps: int, decay_ratio: float) -> RunConfig:
        schedule = {"name": "wsd", "warmup_steps": warmup_steps, "decay_ratio": decay_ratio}
        return RunConfig.model_validate({"train": {"epochs": 1}, "schedule": schedule})

    assert decay_steps(wsd(0, 0.2).schedule, 1102) == 220
    assert decay_steps(wsd(0, 0.001).schedule, 30) == 1
    assert resolve_geometry(wsd(6, 0.8), 1, 240).total_steps == 30
    with pytest.raises(ConfigError) as caught:
        resolve_geometry(wsd(7, 0.8), 1, 240)
    assert caught.value.what == "schedule.warmup_steps 7 and the 24 steps of schedule.decay_ratio 0.8 overlap"
    assert "only 30 steps" in caught.value.why
    assert caught.value.fix.startswith("set schedule.warmup_steps=3 or schedule.decay_ratio=0.7666,")
    for cure in (wsd(3, 0.8), wsd(7, 0.7666)):
        resolve_geometry(cure, 1, 240)
    with pytest.raises(ConfigError, match="overlap") as caught:
        resolve_geometry(wsd(1, 1.0), 1, 240)
    assert caught.value.fix.startswith("set schedule.warmup_steps=0 or schedule.decay_ratio=0.9666,")
    other = wsd(7, 0.8).schedule.model_copy(update={"name": "cosine"})
    assert resolve_geometry(wsd(7, 0.8).model_copy(update={"schedule": other}), 1, 240).total_steps == 30


def test_a_plan_is_plain_json() -> None:
    run = config(total_steps=10, grad_accum_steps=2)
    plan = describe_plan(run, 2, 1024)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["geometry"]["global_batch_size"] == 32
    assert plan["total_tokens"] == 10 * 32 * 512
    # 6 blocks of 4 x 256^2 + 3 x 256 x 704 + 2 x 256, one norm, one tied matrix
    assert plan["parameters"] == {"total": 6 * 803_328 + 256 + 1024 * 256, "embedding": 1024 * 256}
    assert plan["flops_per_token"] == 6 * (6 * 802_816 + 1024 * 256) + 12 * 6 * 256 * 512
    memory = plan["memory_bytes"]
    assert memory["weights"] == plan["parameters"]["total"] * 4
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


def test_the_vocabulary_as_far_as_it_is_known() -> None:
    assert planned_vocab_size(RunConfig.model_validate({"tokenizer": {"vocab_size": 1000}})) == 1024
    assert planned_vocab_size(RunConfig.model_validate({"model": {"vocab_size": 1000}})) == 1000
    unknown = RunConfig.model_validate({"tokenizer": {"path": "tok"}, "train": {"total_steps": 500}})
    assert planned_vocab_size(unknown) is None
    assert describe_plan(unknown)["parameters"] is None
    assert describe_plan(unknown, vocab_size=512)["parameters"]["embedding"] == 512 * 256


def test_planned_ranks() -> None:
    assert planned_ranks(RunConfig()) == 1
    assert planned_ranks(RunConfig.model_validate({"engine": {"nproc": 3}})) == 3


def sft(path: object, **settings: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "recipe": "sft",
            "model": {"path": str(path)},
            "train": {"epochs": 1, "micro_batch_size": 2},
            **settings,
        }
    )


def test_a_plan_reads_the_shape_of_a_local_model(tmp_path: Path) -> None:
    shape = {
        "model_type": "qwen3",
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    shape |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    plan = describe_plan(sft(tmp_path, lora={"enabled": True, "r": 4}), 2)
    block = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 96 + 2 * 64 + 2 * 16
    total = 2 * block + 64 + 1024 * 64
    trainable = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert plan["parameters"] == {"total": total, "embedding": 65536, "trainable": trainable}
    assert plan["vocab_size"] == 1024
    assert plan["memory_bytes"]["weights"] == 2 * total + 4 * trainable
    assert json.loads(json.dumps(plan)) == plan


def test_what_a_plan_cannot_know_without_the_model_is_none() -> None:
    plan = describe_plan(sft("org/unheard-of"), 2)
    assert (plan["parameters"], plan["flops_per_token"], plan["memory_bytes"]) == (None, None, None)
    assert plan["vocab_size"] is None
    assert plan["geometry"]["global_batch_size"] == 4


def test_shards_of_an_engine() -> None:
    def shards(**engine: object) -> int | None:
        return shard_count(EngineConfig.model_validate(engine), 8)

    assert [shards(name=name) for name in ("auto", "single", "ddp")] == [None, None, None]
    assert [shards(name=name) for name in ("fsdp", "zero2", "zero3")] == [8, 8, 8]
    assert shards(name="fsdp", sharding="hybrid", shard_ranks=4) == 4
