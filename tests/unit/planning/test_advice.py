"""Advice after running out of memory: each change by itself, valid, and worth what it says."""

from __future__ import annotations

import re

import pytest

from tests.unit.config.test_load import load
from trainway.config.schema import RunConfig
from trainway.planning.advice import Advice, describe_memory, oom_advice
from trainway.planning.geometry import Geometry, plan_memory, planned_shape, resolve_geometry
from trainway.planning.shapes import ModelShape

GIB = 2**30
CASES: list[tuple[str, int, list[str]]] = [
    ("gpt_oss_20b_full", 4, []),
    ("gpt_oss_20b_full", 4, ["engine=fsdp", "cpu_offload=none"]),
    ("gpt_oss_20b_full", 8, ["engine=zero3", "cpu_offload=none"]),
    ("gpt_oss_20b_lora", 4, []),
    ("gpt_oss_20b_lora", 4, ["cpu_offload=optimizer"]),
    ("lora_default", 1, []),
    ("lora_default", 2, ["attention=eager"]),
    ("sft_small", 1, []),
    ("runpod_2b", 4, []),
    ("runpod_1b", 2, ["optim=muon"]),
    ("runpod_1b", 4, ["engine=fsdp", "sharding=hybrid", "shard_ranks=2"]),
    ("m3_medium", 1, []),
]


def setting(name: str, ranks: int, words: list[str]) -> tuple[RunConfig, ModelShape, Geometry]:
    config = load(name, words)
    shape = planned_shape(config)
    assert shape is not None
    return config, shape, resolve_geometry(config, ranks)


def changes(advice: list[Advice]) -> list[str]:
    return [item.change for item in advice]


@pytest.mark.parametrize(("name", "ranks", "words"), CASES)
def test_every_change_is_valid_and_saves_what_it_says(name: str, ranks: int, words: list[str]) -> None:
    config, shape, geometry = setting(name, ranks, words)
    now = plan_memory(config, shape, geometry)
    advice = oom_advice(config, shape, geometry)
    assert advice
    assert [item.saves_bytes for item in advice] == sorted((i.saves_bytes for i in advice), reverse=True)
    for item in advice:
        changed = load({"extends": name, **dict(word.split("=") for word in words)}, item.change.split())
        after = resolve_geometry(changed, ranks)
        assert after.global_batch_size == geometry.global_batch_size, item.change
        assert now.total - plan_memory(changed, shape, after).total == item.saves_bytes > 0, item.change


@pytest.mark.parametrize(("name", "ranks", "words"), CASES)
def test_more_accumulation_is_never_advice_by_itself(name: str, ranks: int, words: list[str]) -> None:
    # X9: at batch 1 it lowers nothing
    for item in oom_advice(*setting(name, ranks, words)):
        if re.search("accum", str(item)):
            assert "train.micro_batch_size=" in item.change


def test_batch_one_of_the_full_fine_tuning() -> None:
    # R66-R69, X9
    found = oom_advice(*setting("gpt_oss_20b_full", 4, ["engine=fsdp", "cpu_offload=none"]))
    assert changes(found) == [
        "lora=true",
        "engine.cpu_offload=all",
        "train.seq_len=1024",
    ]
    assert not re.search("accum|micro_batch", "".join(map(str, found)))
    offload = found[1]
    assert offload.saves_bytes == 16 * 20_914_757_184 // 4
    assert str(offload) == "engine.cpu_offload=all saves 77.91 GiB (slower steps)"
    again = oom_advice(*setting("gpt_oss_20b_full", 4, []))
    assert changes(again)[:3] == ["lora=true", "engine.cpu_offload=all", "train.loss_chunk_tokens=256"]
    assert again[1].saves_bytes == 2 * 20_914_757_184 // 4
    # logits of 768 tokens fewer: as the GEMM writes them, as fp32 log-probabilities, and as the next GEMM reads them
    assert again[2].saves_bytes == 768 * 201088 * (2 + 4 + 2)


def test_a_batch_above_one_is_halved_and_made_one_at_the_same_global_batch() -> None:
    config, shape, geometry = setting("runpod_1b", 2, [])
    found = {item.change: item for item in oom_advice(config, shape, geometry)}
    one = found["train.micro_batch_size=1 train.grad_accum_steps=64"]
    half = found["train.micro_batch_size=2 train.grad_accum_steps=32"]
    memory = plan_memory(config, shape, geometry)
    # activations and the loss's hidden states, with their gradients, are proportional to rows; bf16 copies of weights are not
    copies = 2 * sum(layer.matrices for layer in shape.layers)
    per_row = (memory.activations - copies) // 4 + 2048 * 2048 * 4
    assert (half.saves_bytes, one.saves_bytes) == (2 * per_row, 3 * per_row)
    assert "the same global batch" in str(one)
    odd = oom_advice(*setting("m3_medium", 1, ["micro_batch_size=3", "global_batch_size=6"]))
    assert [c for c in changes(odd) if "micro" in c] == ["train.micro_batch_size=1 train.grad_accum_steps=6"]


def test_more_ranks_where_there_are_any() -> None:
    config, shape, geometry = setting("sft_small", 1, [])
    assert not any("engine" in change for change in changes(oom_advice(config, shape, geometry)))
    found = {item.change: item.saves_bytes for item in oom_advice(config, shape, geometry, ranks=4)}
    assert found["engine.name=fsdp"] > 0 and found["engine.name=zero3"] > 0
    muon = changes(oom_advice(*setting("runpod_1b", 2, ["optim=muon"])))
    assert "engine.name=fsdp" in muon and "engine.name=zero3" not in muon


def test_the_cpu_has_one_memory() -> None:
    config, shape, geometry = setting("gpt_oss_20b_full", 4, [])
    found = changes(oom_advice(config, shape, geometry, on_cpu=True))
    assert not any("offload" in change for change in found)
    lora, adapted, sizes = setting("lora_default", 1, [])
    assert "lora.quantize=4bit" in changes(oom_advice(lora, adapted, sizes))
    assert "lora.quantize=4bit" not in changes(oom_advice(lora, adapted, sizes, on_cpu=True))


def test_what_is_in_use_already_is_no_advice() -> None:
    words = [
        "activation_checkpointing=full",
        "micro_batch_size=1",
        "loss_chunk_tokens=128",
        "seq_len=256",
        "lora=true",
    ]
    config, shape, geometry = setting("sft_small", 1, words)
    assert changes(oom_advice(config, shape, geometry, on_cpu=True)) == []


def test_the_breakdown_in_one_line() -> None:
    assert describe_memory(*setting("gpt_oss_20b_full", 4, [])) == (
        "about 31.97 GiB a rank: gathered shards 15.67, weights 9.74, loss 5.87, activations 0.59, "
        "buffers of gradients 0.09, and 77.91 GiB of the CPU's memory"
    )
