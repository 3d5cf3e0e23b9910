"""Counts against the model itself; FLOPs and memory against hand counts and what autograd really keeps."""

import pytest
import torch

from trainway.config.schema import LoraConfig, ModelConfig
from trainway.models.load import build_model
from trainway.planning.arithmetic import (
    count_parameters,
    flops_per_token,
    memory_bytes,
    padded_vocab_size,
    peak_flops,
)
from trainway.planning.published import published_shape
from trainway.planning.shapes import ModelShape, read_shape

SHAPES = [
    ModelConfig(),
    ModelConfig(tie_embeddings=False, num_kv_heads=2),
    ModelConfig(architecture="qwen3", num_kv_heads=1, head_dim=32),
    ModelConfig(architecture="qwen3", tie_embeddings=False),
]


@pytest.mark.parametrize("config", SHAPES)
def test_counts_equal_the_model(config):
    model = build_model(config, 1024, seed=0, device="meta")
    counts = count_parameters(config, 1024)
    assert counts.total == sum(p.numel() for p in model.parameters()) == counts.trainable
    assert counts.embedding == model.get_input_embeddings().weight.numel()
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert counts.matmul == sum(w.numel() for w in linear)


def test_flops_per_token():
    config = ModelConfig(hidden_size=384, num_layers=8, num_heads=6, intermediate_size=1024)
    matmul = 8 * (4 * 384**2 + 3 * 384 * 1024) + 16384 * 384
    assert flops_per_token(config, 16384, 512) == 6 * matmul + 12 * 8 * 384 * 512
    assert flops_per_token(config, 16384, 512, causal=True) == 6 * matmul + 12 * 8 * 384 * 256.5


def test_peaks_and_padding():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("AMD EPYC") is None
    assert [padded_vocab_size(n) for n in (1, 64, 65, 32000)] == [64, 64, 128, 32000]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("half", [False, True])
def test_activations_are_what_autograd_keeps(config, half):
    model = build_model(config, 128, seed=0)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # transformers' own blocks, which the estimate is for
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        weights_in_half = tensor.ndim == 2 and tensor.shape[0] != 2 * 64 and half
        if storage.data_ptr() not in own and tensor.is_floating_point() and not weights_in_half:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=half):
        model.model(input_ids=ids, boundaries=(0, 64, 128), use_cache=False)
    estimate = memory_bytes(
        config, 128, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64, half_precision=half
    )
    assert estimate.activations == pytest.approx(sum(kept.values()), rel=0.12)


def test_memory_parts():
    config = ModelConfig()
    total = count_parameters(config, 1024).total
    adamw = memory_bytes(config, 1024, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64)
    muon = memory_bytes(config, 1024, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64, optimizer="muon")
    full = memory_bytes(
        config, 1024, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64, checkpointing="full"
    )
    assert adamw.weights == adamw.gradients == 4 * total and adamw.optimizer == 8 * total
    assert 4 * total < muon.optimizer < adamw.optimizer
    assert full.activations < adamw.activations / 2
    assert adamw.logits == 64 * 1024 * 4 + (128 + 1024) * 256 * 4
    assert adamw.total == 16 * total + adamw.activations + adamw.logits


def test_shards_divide_the_states_and_gather_what_is_needed_at_once():
    config, sizes = ModelConfig(num_layers=8), {"micro_batch_size": 2, "seq_len": 64, "loss_chunk_tokens": 64}
    total = count_parameters(config, 1024).total
    block = (count_parameters(config, 1024).matmul - 1024 * config.hidden_size) // config.num_layers
    whole = memory_bytes(config, 1024, **sizes)
    sharded = memory_bytes(config, 1024, shards=4, **sizes)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (total, total, 2 * total)
    assert whole.gathered == 0
    # embedding and norms with their gradients, and two blocks with theirs
    assert sharded.gathered == 8 * (total - 8 * block) + 2 * 8 * block
    assert (sharded.activations, sharded.logits) == (whole.activations, whole.logits)
    half = memory_bytes(config, 1024, shards=4, half_precision=True, **sizes)
    assert half.gathered == sharded.gathered - 2 * 2 * block  # blocks travel in two bytes


@pytest.mark.parametrize("config", SHAPES)
def test_selective_checkpointing_keeps_what_products_gave(config):
    """Measured: what lives between forward and backward of the blocks, beside the parameters."""
    none, selective, full = (
        memory_bytes(config, 128, micro_batch_size=2, seq_len=64, loss_chunk_tokens=64, checkpointing=policy)
        for policy in ("none", "selective", "full")
    )
    assert full.activations < selective.activations < none.activations


GPT_OSS = "openai/gpt-oss-20b"
SIZES = {"micro_batch_size": 2, "seq_len": 64, "loss_chunk_tokens": 64}


def published(name: str) -> ModelShape:
    shape = published_shape(name)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("openai/gpt-oss-20b", 20_914_757_184, 4_187_440_704),
        ("openai/gpt-oss-120b", 116_829_156_672, 5_711_982_912),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, 3_085_938_688),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 134_515_008),
    ],
)
def test_published_models_have_their_published_sizes(name, total, active):
    counts = count_parameters(published(name))
    assert counts.total == counts.trainable == total
    assert counts.active == active


def test_flops_of_a_mixture_and_of_its_windows():
    shape = published(GPT_OSS)
    counts = count_parameters(shape)
    experts = 24 * 32 * (2880 * 5760 + 2880 * 2880)
    attention = 24 * 2 * 2880 * (4096 + 512)
    assert counts.matmul == experts * 4 // 32 + attention + 201088 * 2880
    biases = 24 * 32 * (5760 + 2880)
    assert counts.active == counts.total - (experts + biases) * 28 // 32
    # published as 3.61B, which leaves the input embedding out
    assert round((counts.active - counts.embedding) / 1e9, 2) == 3.61
    # every other layer looks back 128 tokens
    assert flops_per_token(shape, context=2048) == 6 * counts.matmul + 12 * 12 * 4096 * (2048 + 128)
    assert flops_per_token(shape, context=64) == 6 * counts.matmul + 12 * 24 * 4096 * 64


def test_frozen_weights_have_no_gradient_of_their_own():
    shape = published("Qwen/Qwen2.5-3B-Instruct")
    lora = LoraConfig(enabled=True, r=16)
    adapters = 36 * 16 * (2 * 4096 + 2 * 2304)
    attention = 12 * 36 * 2048 * 512
    assert count_parameters(shape, lora=lora).trainable == adapters
    assert flops_per_token(shape, context=512, lora=lora) == (
        4 * count_parameters(shape).matmul + 6 * adapters + attention
    )
    off = LoraConfig(r=16)
    assert flops_per_token(shape, context=512, lora=off) == flops_per_token(shape, context=512)
    assert count_parameters(shape, lora=off).trainable == 3_085_938_688


@pytest.mark.parametrize(("half", "work"), [(False, 4), (True, 2)])
def test_adapters_are_fp32_on_a_frozen_model_in_the_type_of_the_arithmetic(half, work):
    shape = published("Qwen/Qwen2.5-3B-Instruct")
    lora, adapters = LoraConfig(enabled=True, r=16), 36 * 16 * (2 * 4096 + 2 * 2304)
    memory = memory_bytes(shape, lora=lora, half_precision=half, **SIZES)
    assert memory.weights == work * 3_085_938_688 + 4 * adapters
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 8 * adapters)
    # the head is frozen: no gradient of its own, and in half precision already
    assert memory.logits == 64 * 151936 * (4 + (2 if half else 0)) + 128 * 2048 * 4
    in_blocks = 3_085_938_688 - 151936 * 2048 - 73 * 2048 - 36 * (2048 + 512)
    quantized = memory_bytes(
        shape, lora=lora.model_copy(update={"quantize": "4bit"}), half_precision=half, **SIZES
    )
    assert memory.weights - quantized.weights == work * in_blocks - in_blocks * 33 // 64


@pytest.mark.parametrize("half", [False, True])
def test_deepspeed_cuts_the_states_and_keeps_an_fp32_copy(half):
    config = ModelConfig(num_layers=8)
    total = count_parameters(config, 1024).total
    work = 2 if half else 4

    def memory(engine, **settings):
        return memory_bytes(config, 1024, shards=4, engine=engine, half_precision=half, **settings, **SIZES)

    two, three = memory("zero2"), memory("zero3")
    assert (two.weights, two.gradients, two.optimizer) == (work * total, total, 3 * total)
    assert (three.weights, three.gradients, three.optimizer) == (work * total // 4, total, 3 * total)
    assert (two.host, three.host) == (0, 0)
    optimizer = memory("zero3", cpu_offload="optimizer")
    assert (optimizer.weights, optimizer.gradients, optimizer.optimizer) == (work * total // 4, 0, 0)
    assert optimizer.host == 4 * total
    everything = memory("zero3", cpu_offload="all")
    assert (everything.weights, everything.host) == (0, 4 * total + work * total // 4)
    assert everything.gathered == three.gathered > two.gathered


def test_fsdp_offloads_all_states():
    config = ModelConfig(num_layers=8)
    total = count_parameters(config, 1024).total
    memory = memory_bytes(config, 1024, shards=4, cpu_offload="all", **SIZES)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.host) == (0, 0, 0, 4 * total)
    kept = memory_bytes(config, 1024, shards=4, **SIZES)
    assert memory.total == kept.total - 4 * total


def test_eager_attention_keeps_the_scores_of_a_row():
    config = ModelConfig(num_layers=1)
    plain = memory_bytes(config, 1024, **SIZES)
    eager = memory_bytes(config, 1024, eager_attention=True, **SIZES)
    assert eager.activations - plain.activations == 2 * 64 * 64 * 4 * (4 + 4)


def test_a_layer_of_experts_keeps_what_each_of_a_tokens_experts_gave():
    base = {"model_type": "mixtral", "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4}
    base |= {
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    mixture, dense = read_shape(base), read_shape({**base, "model_type": "mistral"})
    more = memory_bytes(mixture, **SIZES).activations - memory_bytes(dense, **SIZES).activations
    assert more == 128 * 2 * 4 * (2 * (4 * 96 + 2 * 64) - 4 * 96)
