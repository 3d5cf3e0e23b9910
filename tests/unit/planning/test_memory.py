"""What the plan counts, against what autograd really keeps and against hand counts of every part and phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainway import losses, muon
from trainway.config.schema import LoraConfig, ModelConfig
from trainway.engines import ds_config
from trainway.models import fused
from trainway.models.blocks import blocks
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.load import build_model
from trainway.models.lora import inject_lora
from trainway.planning.activations import FUSED, Kept, Step
from trainway.planning.arithmetic import MemoryEstimate, count_parameters
from trainway.planning.memory import BUCKET, CPU_CHUNK_LOGITS, MUON_TOGETHER, memory_bytes
from trainway.planning.published import published_shape
from trainway.planning.shapes import new_shape, read_shape

BASE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 96}
SHAPES = {
    "llama": ModelConfig(**BASE),
    "grouped": ModelConfig(**BASE, tie_embeddings=False, num_kv_heads=2),
    "qwen3": ModelConfig(**BASE, architecture="qwen3", num_kv_heads=2, head_dim=32),
}
TOKENS, VOCAB = 112, 160  # no size that a weight has
QKVO = LoraConfig(enabled=True, r=4)
ALL = LoraConfig(enabled=True, r=4, target_modules=("all-linear",))


def step(**changes: object) -> Step:
    values = {
        "tokens": TOKENS, "seq_len": TOKENS, "chunk_tokens": 64, "accumulates": False, "checkpointing": "none",
        "half": False, "on_cpu": True, "eager": False, "documents": False,
    }  # fmt: skip
    return Step(**{**values, **changes})  # type: ignore[arg-type]


def saved_bytes(config: ModelConfig, how: Step, lora: LoraConfig | None) -> float:
    """Bytes of one token that the forward pass of a real model's body leaves for the backward pass."""
    model = build_model(config, VOCAB, seed=0)
    if lora is not None:
        if how.half:
            model = model.to(torch.bfloat16)
        inject_lora(model, lora, base="org/base")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.train()
    if not how.on_cpu:
        for module in model.modules():
            module.__dict__.pop("forward", None)  # transformers' own blocks
    if how.checkpointing != "none":
        checkpoint_activations(blocks(model), how.checkpointing)  # type: ignore[arg-type]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast_weight = how.half and tuple(tensor.shape) in weights
        if storage.data_ptr() not in own and tensor.is_floating_point() and not cast_weight:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    boundaries = (0, 40, 100, TOKENS) if how.documents else (0, TOKENS)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.half),
    ):
        body: nn.Module = model.get_submodule(model.base_model_prefix)
        body(
            input_ids=ids,
            position_ids=torch.arange(TOKENS)[None],
            boundaries=boundaries,
            use_cache=False,
        )
    return sum(kept.values()) / TOKENS


@pytest.mark.parametrize("lora", [None, QKVO, ALL], ids=["whole", "qkvo", "all-linear"])
@pytest.mark.parametrize(
    "how",
    [step(), step(documents=True), step(half=True), step(on_cpu=False), step(on_cpu=False, half=True)],
    ids=["cpu", "documents", "cpu-bf16", "own-fp32", "own-bf16"],
)
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(name: str, how: Step, lora: LoraConfig | None) -> None:
    config = SHAPES[name]
    real = saved_bytes(config, how, lora)
    ids = 3 * 8
    assert Kept.of(new_shape(config, VOCAB), how, lora).all - ids == pytest.approx(real, rel=0.05)


def test_what_it_repeats_of_modules_with_torch_is_what_they_say() -> None:
    assert {family: parts for family, (_, parts) in fused._FUSED.items() if family in FUSED} == FUSED
    assert CPU_CHUNK_LOGITS == losses.CPU_CHUNK_LOGITS
    assert BUCKET == ds_config.BUCKET
    assert MUON_TOGETHER == muon.TOGETHER


NEW = ModelConfig(num_layers=8)
"""Llama, 256 wide, 4 heads of 64, feed-forward 704, tied embeddings."""
TOTAL = count_parameters(NEW, 1024).total
HEAD = 1024 * 256
BLOCK = 4 * 256**2 + 3 * 256 * 704


def memory(model: Any = NEW, **settings: Any) -> MemoryEstimate:
    sizes = {
        "micro_batch_size": 2,
        "seq_len": 64,
        "loss_chunk_tokens": 64,
        "on_cpu": True,
        "documents": False,
    }
    return memory_bytes(model, 1024, **{**sizes, **settings})


def test_a_steps_highest_point() -> None:
    # a micro-batch after the first: gradients are there when the loss is computed
    found = memory()
    assert (found.weights, found.gradients, found.optimizer) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL)
    norm, attention = 4 * 256, 4 * 4 * 256 + 4 * 4
    block = 2 * norm + attention + 2 * 4 * 256 + 3 * 4 * 704  # with the norms' outputs and gate, up, product
    # the last norm, cosines and sines, ids; the loss's own backward pass, when the hidden states are gone
    assert found.activations == 128 * (8 * block + norm + 2 * 4 * 64 + 24)
    assert found.logits == 2 * 4 * (128 * 256 + HEAD)
    assert found.total == 16 * TOTAL + found.activations + found.logits


def test_the_only_micro_batch_has_no_gradients_yet() -> None:
    many, one = (memory(micro_batch_size=32, accumulates=several) for several in (True, False))
    assert many.total - one.total == many.gradients == 4 * TOTAL
    assert one.gradients == 0
    # with few tokens the end of the backward pass is higher: all gradients, and the embedding's beside them
    end = memory(micro_batch_size=1, seq_len=8, accumulates=False)
    assert (end.gradients, end.logits) == (4 * TOTAL, 4 * HEAD)


def test_the_loss_on_a_gpu_in_bf16() -> None:
    found = memory(on_cpu=False, half_precision=True, micro_batch_size=256, loss_chunk_tokens=16384)
    tokens = 256 * 64
    # gradients of hidden states and head, the hidden states and the head in bf16, one more such gradient of the head,
    # and logits three times: as the product gave them, as log-probabilities, as the product takes them
    assert found.logits == (2 + 2) * tokens * 256 + (4 + 2 + 2) * HEAD + tokens * 1024 * (2 + 4 + 2)
    # autocast keeps the blocks' matrices in bf16 for a micro-batch; a sharded engine gathers them so
    sharded = memory(on_cpu=False, half_precision=True, micro_batch_size=256, loss_chunk_tokens=16384, engine="fsdp", shards=1)  # fmt: skip
    assert found.activations - sharded.activations == 2 * 8 * BLOCK


def test_a_cpu_holds_few_logits_at_a_time() -> None:
    vocab = 2**16
    sizes = {"micro_batch_size": 8, "seq_len": 512, "loss_chunk_tokens": 4096, "accumulates": False}
    small = memory_bytes(NEW, vocab, **sizes, on_cpu=True)  # type: ignore[arg-type]
    large = memory_bytes(NEW, vocab, **sizes)  # type: ignore[arg-type]
    assert small.logits <= 2 * 4 * (4096 * 256 + vocab * 256)
    assert large.logits >= 8 * 4096 * vocab


@pytest.mark.parametrize("accumulates", [True, False])
def test_ddp_keeps_its_buckets(accumulates: bool) -> None:
    found = memory(engine="ddp", accumulates=accumulates)
    alone = memory(accumulates=True)
    assert found.gradients == 4 * TOTAL  # views of the buckets, from the first step on
    # what the first micro-batches leave lies beside them
    assert found.communication == 4 * TOTAL * accumulates
    assert found.total == alone.total + found.communication


def test_shards_divide_the_states_and_gather_what_is_needed_at_once() -> None:
    whole, sharded = memory(), memory(engine="fsdp", shards=4)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (TOTAL, TOTAL, 2 * TOTAL)
    # embedding and norms with their gradients, and two blocks with theirs, in the blocks' backward pass
    assert sharded.gathered == 8 * (TOTAL - 8 * BLOCK) + 2 * 8 * BLOCK
    assert (sharded.activations, sharded.logits) == (whole.activations + 128 * 4 * (2 * 704 + 2 * 256), 0)
    # with more words than the rest of it weighs, the loss's own backward pass holds most, and no gradient is gathered yet
    wide = memory_bytes(NEW, 2**16, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64, on_cpu=True, engine="fsdp", shards=4)  # fmt: skip
    assert wide.logits == 2 * 4 * (128 * 256 + 2**16 * 256)
    assert wide.gathered == 4 * (2**16 * 256 + TOTAL - 8 * BLOCK - HEAD)
    half = memory(engine="fsdp", shards=4, half_precision=True)
    assert half.gathered == sharded.gathered - 2 * 2 * BLOCK  # blocks travel in two bytes


@pytest.mark.parametrize("half", [False, True])
def test_deepspeed_cuts_the_states_and_keeps_an_fp32_copy(half: bool) -> None:
    work = 2 if half else 4

    def cut(engine: str, **settings: Any) -> MemoryEstimate:
        return memory(engine=engine, shards=4, half_precision=half, on_cpu=False, **settings)

    two, three = cut("zero2"), cut("zero3")
    assert (two.weights, two.gradients, two.optimizer) == (work * TOTAL, TOTAL, 3 * TOTAL)
    assert (three.weights, three.gradients, three.optimizer) == (work * TOTAL // 4, TOTAL, 3 * TOTAL)
    # gradients travel in buckets of the weights' type, two of them in stage 2
    assert (two.communication, three.communication) == (2 * work * TOTAL, work * TOTAL)
    assert (two.host, three.host) == (0, 0)
    optimizer, everything = cut("zero3", cpu_offload="optimizer"), cut("zero3", cpu_offload="all")
    assert (optimizer.gradients, optimizer.optimizer, optimizer.host) == (0, 0, 4 * TOTAL)
    assert (everything.weights, everything.host) == (0, 4 * TOTAL + work * TOTAL // 4)
    assert everything.gathered == three.gathered > two.gathered


def test_fsdp_offloads_all_states_of_a_gpu() -> None:
    kept, off = (
        memory(engine="fsdp", shards=4, on_cpu=False, cpu_offload=where) for where in ("none", "all")
    )
    assert (off.weights, off.gradients, off.optimizer, off.host) == (0, 0, 0, 4 * TOTAL)
    assert off.total == kept.total - 4 * TOTAL
    # on a CPU there is nowhere else
    assert memory(engine="fsdp", shards=4, cpu_offload="all") == memory(engine="fsdp", shards=4)


@pytest.mark.parametrize(("half", "work"), [(False, 4), (True, 2)])
def test_adapters_are_fp32_on_a_frozen_model_in_the_type_of_the_arithmetic(half: bool, work: int) -> None:
    shape = published_shape("Qwen/Qwen2.5-3B-Instruct")
    assert shape is not None
    adapters = 36 * 16 * (2 * 4096 + 2 * 2304)

    def adapted(lora: LoraConfig) -> MemoryEstimate:
        return memory(shape, on_cpu=False, half_precision=half, lora=lora)

    found = adapted(LoraConfig(enabled=True, r=16))
    quantized = adapted(LoraConfig(enabled=True, r=16, quantize="4bit"))
    assert found.weights == work * 3_085_938_688 + 4 * adapters
    assert (found.gradients, found.optimizer) == (4 * adapters, 8 * adapters)
    # the head is frozen: no gradient of its own, and in half precision already
    assert found.logits == 64 * 151936 * 8 + 128 * 2048 * (2 + 2 if half else 4)
    in_blocks = 3_085_938_688 - 151936 * 2048 - 73 * 2048 - 36 * (2048 + 512)
    assert found.weights - quantized.weights == work * in_blocks - in_blocks * 33 // 64


@pytest.mark.parametrize("name", SHAPES)
def test_checkpointing_keeps_less(name: str) -> None:
    shape = new_shape(SHAPES[name].model_copy(update={"num_layers": 12}), VOCAB)
    none, selective, full = (
        Kept.of(shape, step(checkpointing=how), None).all for how in ("none", "selective", "full")
    )
    assert full < selective < none
    block = (none - Kept.of(new_shape(SHAPES[name].model_copy(update={"num_layers": 11}), VOCAB), step(), None).all)  # fmt: skip
    assert full == none - 12 * block + 12 * 4 * 64 + block  # each block's input, and one block again


def test_eager_attention_keeps_the_scores_of_a_row() -> None:
    shape = new_shape(SHAPES["llama"], VOCAB)
    for half, size in ((False, 4), (True, 4 + 2)):
        plain, eager = (Kept.of(shape, step(half=half, eager=how), None).all for how in (False, True))
        assert eager - plain == 3 * 4 * TOKENS * size


def test_a_layer_of_experts_keeps_what_each_of_a_tokens_experts_gave() -> None:
    base = {"model_type": "mixtral", "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4}
    base |= {
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    mixture, dense = read_shape(base), read_shape({**base, "model_type": "mistral"})
    assert mixture is not None and dense is not None
    how = step(on_cpu=False)
    more = Kept.of(mixture, how, None).all - Kept.of(dense, how, None).all
    # four inner values and two outer ones for each of two experts; the dense layer's own input is shared by gate and up
    assert more == 2 * 4 * (2 * (4 * 96 + 2 * 64) - 4 * 96 - 64)


def test_muon_s_step_can_be_the_highest_point(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 matrices of 704 x 256 at once: themselves, their product twice, two squares of 256 each
    step_bytes = 16 * (3 * 704 * 256 + 2 * 256**2) * 4
    moments = 8 * TOTAL - 4 * 8 * BLOCK
    found = memory(optimizer="muon")
    assert found.total == 4 * TOTAL + 4 * TOTAL + moments + step_bytes
    assert memory(optimizer="muon", micro_batch_size=512).optimizer == moments  # the forward pass holds more
    monkeypatch.setattr("trainway.planning.memory.MUON_TOGETHER", 2 * 704 * 256)
    two = 32 * (3 * 256**2 + 2 * 256**2) * 4  # of 256 x 256 five still go together
    assert memory(optimizer="muon").optimizer < moments + max(step_bytes, two) // 4


def test_selective_checkpointing_keeps_what_adapters_give_too() -> None:
    shape = new_shape(NEW, 1024)
    how = step(checkpointing="selective")
    with_adapters, without = (Kept.of(shape, how, lora).all for lora in (QKVO, None))
    # 8 blocks: q, k, v and o of 256 and their inner products of 4; then the block that is made again has adapters' inputs
    assert with_adapters - without >= 8 * 4 * (4 * (256 + 4)) - shape.hidden_size * 4 * 16
