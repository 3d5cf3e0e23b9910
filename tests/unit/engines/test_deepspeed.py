"""DeepSpeed behind the contract of a learner, on one process: what is frozen, tied, refused or not finite."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch

from trainway.config.schema import EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainway.engines import build_learner
from trainway.engines.world import open_world
from trainway.errors import EnvironmentFault
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.load import NewWeights, build_model

SHAPE = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=24, max_seq_len=16
)
ENGINES = ["zero2", "zero3"]


class Run:
    """A learner of a tiny model with tied embeddings, in this process."""

    def __init__(self, stack: ExitStack, engine: str, frozen: tuple[str, ...] = (), **train: object) -> None:
        config = RunConfig(
            model=SHAPE,
            engine=EngineConfig(name=engine),
            optim=OptimConfig(lr=1e-2),
            train=TrainConfig(micro_batch_size=2, grad_accum_steps=2, num_threads=1, **train),
        )
        world = stack.enter_context(open_world(config.engine, 1))
        model = build_model(SHAPE, 61, seed=0, device="meta")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        self.loss = CausalLMLoss(model.train())
        self.learner = build_learner(config, self.loss, model, world, NewWeights(SHAPE, 3))

    def step(
        self, number: int, accept: Callable[[float], bool] = lambda norm: True, factor: float = 1.0
    ) -> tuple[float, float]:
        """Loss and gradient norm of a step over two micro-batches."""
        generator = torch.Generator().manual_seed(number)
        total = 0.0
        for last in (False, True):
            ids = torch.randint(0, 61, (2, 8), generator=generator)
            with self.learner.micro_step(sync=last):
                loss = self.learner.module(ids, ids)
                self.learner.backward(loss, scale=factor / 32)
            total += loss.item()
        return total / 32, self.learner.step(1.0, 0.5, accept)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: piece.tensor.detach().clone() for name, piece in self.learner.pieces.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "layers.0.", "norm")])
def test_it_trains_as_one_process_does(engine: str, frozen: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        single, zero = Run(stack, "single", frozen), Run(stack, engine, frozen)
        first = zero.weights()
        assert same(single.weights(), first)
        for number in range(4):
            assert zero.step(number) == pytest.approx(single.step(number), rel=1e-5)
        ours, theirs = single.weights(), zero.weights()
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-6)
            assert torch.equal(theirs[name], first[name]) == any(part in name for part in frozen), name
        assert "lm_head.weight" not in ours  # tied: one weight


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_accepted_leaves_everything_as_it_was(engine: str) -> None:
    with ExitStack() as stack:
        single, zero = Run(stack, "single"), Run(stack, engine)
        zero.step(0)
        single.step(0)
        before, seen = zero.weights(), []
        norm = zero.step(1, lambda norm: bool(seen.append(norm)))[1]
        assert seen == [norm] == pytest.approx([single.step(1, lambda norm: False)[1]], rel=1e-5)
        assert same(zero.weights(), before)
        for number in (2, 3):  # neither gradients nor moments of it are left
            assert zero.step(number) == pytest.approx(single.step(number), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_gradients_that_are_not_finite_never_reach_the_weights(
    engine: str, precision: str, factor: float
) -> None:
    with ExitStack() as stack:
        zero = Run(stack, engine, precision=precision)
        zero.step(0)
        before, seen = zero.weights(), []
        norm = zero.step(1, lambda norm: bool(seen.append(norm)), factor)[1]
        assert seen == [norm] and not math.isfinite(norm)
        assert same(zero.weights(), before)
        assert math.isfinite(zero.step(2)[1])
        assert not same(zero.weights(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_computes_in_bf16_and_keeps_fp32_weights(engine: str) -> None:
    with ExitStack() as stack:
        single, zero = Run(stack, "single"), Run(stack, engine, precision="bf16")
        assert same(single.weights(), zero.weights())  # not rounded to bf16 on the way
        assert {parameter.dtype for parameter in zero.loss.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in zero.loss.buffers()} == {torch.float32}
        for number in range(4):
            assert zero.step(number)[0] == pytest.approx(single.step(number)[0], rel=5e-3)


def test_nothing_of_deepspeed_is_left_behind() -> None:
    with ExitStack() as stack:
        Run(stack, "zero3").step(0)
        assert torch.nn.functional.linear is not torch._C._nn.linear  # it had its own
    assert torch.nn.functional.linear is torch._C._nn.linear
    assert not torch.distributed.is_initialized()


def test_a_missing_deepspeed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with ExitStack() as stack, pytest.raises(EnvironmentFault) as caught:
        Run(stack, "zero2")
    assert caught.value.what == "engine.name is zero2 or zero3, and DeepSpeed is not installed"
    assert caught.value.fix == "pip install ninja && pip install --no-build-isolation 'deepspeed>=0.19.8'"
