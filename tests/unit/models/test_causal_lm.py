"""The wrapped loss with and without z-loss: values and gradients of tied and untied heads, and evaluation."""

import pytest
import torch
import torch.nn.functional as F

from trainway.config.schema import ModelConfig
from trainway.losses import IGNORE_INDEX
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.load import build_model

VOCAB = 64


def _module(tied, z_loss):
    config = ModelConfig(
        hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, tie_embeddings=tied, init_std=0.3
    )
    return CausalLMLoss(build_model(config, VOCAB, seed=0), chunk_tokens=5, z_loss=z_loss)


def _batch():
    ids = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[0, :4] = IGNORE_INDEX
    return ids[:, :-1], labels


@pytest.mark.parametrize("tied", [True, False])
def test_z_loss_equals_plain_transformers(tied):
    ours, plain = _module(tied, 0.02), _module(tied, 0.0)
    ids, labels = _batch()
    sums = ours(ids, labels)
    sums.sum().backward()
    logits = plain.model(ids, use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    z = 0.02 * (logits.logsumexp(-1)[labels != IGNORE_INDEX] ** 2).sum()
    (nll + z).backward()
    assert z > 0.1
    torch.testing.assert_close(sums, torch.stack([nll, z]), rtol=1e-5, atol=0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_reads_the_cross_entropy_alone():
    module, without = _module(True, 0.02), _module(True, 0.0)
    evaluated = module.eval()(*_batch())
    assert evaluated.ndim == 0 and torch.equal(evaluated, without(*_batch()))
    assert module.train()(*_batch()).shape == (2,)
