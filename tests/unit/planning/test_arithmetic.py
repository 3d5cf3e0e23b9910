"""Counts against the model itself; FLOPs and memory against hand counts and what autograd really keeps."""

import pytest
import torch

from trainway.config.schema import ModelConfig
from trainway.models.load import build_model
from trainway.planning.arithmetic import (
    count_parameters,
    flops_per_token,
    memory_bytes,
    padded_vocab_size,
    peak_flops,
)

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
