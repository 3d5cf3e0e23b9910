"""AdamW groups, Muon's iteration and its equality with torch's, clipping."""

import pytest
import torch
from torch import nn

from trainway.config.schema import OptimConfig
from trainway.errors import ConfigError
from trainway.muon import Muon, orthogonalize
from trainway.optim import build_optimizers, clip_gradients, set_learning_rates


def _named():
    shapes = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.q_proj.weight": (4, 4),
        "model.layers.0.up_proj.weight": (6, 4),
        "model.layers.0.norm.weight": (4,),
        "lm_head.weight": (8, 4),
    }
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def test_adamw_decays_matrices_only():
    (adamw,) = build_optimizers(_named(), OptimConfig(weight_decay=0.3))
    assert [(len(g["params"]), g["weight_decay"]) for g in adamw.param_groups] == [(4, 0.3), (1, 0.0)]


def test_muon_takes_block_matrices_and_adamw_the_rest():
    named = _named()
    muon, adamw = build_optimizers(named, OptimConfig(name="muon"))
    assert isinstance(muon, Muon)
    blocks = {id(p) for name, p in named if "layers" in name and p.ndim == 2}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == blocks
    assert sum(len(g["params"]) for g in adamw.param_groups) == 3
    set_learning_rates([muon, adamw], 0.5)
    assert muon.param_groups[0]["lr"] == 0.01 and adamw.param_groups[0]["lr"] == 3e-4


def test_nothing_trainable_is_a_config_error():
    with pytest.raises(ConfigError, match="trainable"):
        build_optimizers([("w", nn.Parameter(torch.ones(2), requires_grad=False))], OptimConfig())


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalize(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices, steps=8)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (result * (u @ v)).sum() / (result.norm() * (u @ v).norm()) > 0.97
    for one, batched in zip(matrices, result, strict=True):
        torch.testing.assert_close(orthogonalize(one[None], steps=8)[0], batched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)])
def test_muon_equals_torch_within_bf16(shape):
    torch_muon = pytest.importorskip("torch.optim").Muon
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    b = torch_muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.03 * expected.norm()


def test_matrices_in_turn_end_where_all_at_once_do(monkeypatch):
    def trained(together: int) -> list[torch.Tensor]:
        monkeypatch.setattr("trainway.muon.TOGETHER", together)
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(24, 16, generator=generator)) for _ in range(5)]
        optimizer = Muon(parameters, lr=0.1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(24, 16, generator=generator)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for together in (1, 2 * 24 * 16):
        torch.testing.assert_close(trained(together), trained(2**25), rtol=1e-5, atol=1e-6)


def test_muon_state_is_per_parameter_and_reloads():
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    muon = Muon(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    muon.step()
    assert all(muon.state[p]["momentum_buffer"].shape == p.shape for p in parameters)
    again = Muon(parameters, lr=0.1)
    again.load_state_dict(muon.state_dict())
    assert torch.equal(
        again.state[parameters[1]]["momentum_buffer"], muon.state[parameters[1]]["momentum_buffer"]
    )


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clip_gradients(max_norm):
    ours = [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2))]
    theirs = [nn.Parameter(torch.zeros_like(p)) for p in ours]
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm or float("inf"))
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert clip_gradients([nn.Parameter(torch.zeros(1))], 1.0) == 0
