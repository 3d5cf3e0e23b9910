"""Running out of memory ends with what was asked for, the plan, and what would make it fit."""

from __future__ import annotations

import pytest
import torch

from tests.unit.config.test_load import load
from trainway.engines.world import World
from trainway.errors import EnvironmentFault, ExitCode
from trainway.planning.geometry import planned_shape, resolve_geometry
from trainway.training.memory import memory_advice

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.02 GiB is "
    "free. Including non-PyTorch memory, this process has 78.12 GiB memory in use."
)
GPU = World(1, 1, 4, 4, torch.device("cuda", 1))
CPU = World(0, 0, 1, 1, torch.device("cpu"))


def fault(
    error: BaseException, name: str, *words: str, world: World = CPU, known: bool = True
) -> EnvironmentFault:
    config = load(name, list(words))
    shape = planned_shape(config) if known else None
    with (
        pytest.raises(EnvironmentFault) as caught,
        memory_advice(config, shape, resolve_geometry(config, world.world_size), world),
    ):
        raise error
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert caught.value.__cause__ is error
    return caught.value


def test_a_full_gpu_at_batch_one() -> None:
    # R66-R69, X9, fault 17
    found = fault(torch.OutOfMemoryError(CUDA_SAYS), "gpt_oss_20b_full", world=GPU)
    assert found.what == "rank 1: the memory of cuda:1 is full, asked for 2.25 GiB more"
    assert found.why.startswith(
        "the plan: about 31.97 GiB a rank: gathered shards 15.67, weights 9.74, loss 5.87"
    )
    first, second, *_ = found.fix.split("; ")
    assert first == "lora=true saves 15.14 GiB (adapters instead of all weights)"
    assert second == "engine.cpu_offload=all saves 9.74 GiB (slower steps)"
    assert "accum" not in found.fix


def test_more_rows_than_fit() -> None:
    found = fault(torch.cuda.OutOfMemoryError(CUDA_SAYS), "lora_default", "bf16=true", world=GPU)
    best = found.fix.split("; ")
    assert best[0] == "train.activation_checkpointing=full saves 14.30 GiB (a third more arithmetic)"
    assert "train.micro_batch_size=1 train.grad_accum_steps=16 saves 7.47 GiB (the same global batch)" in best
    assert len(best) <= 6


def test_a_real_allocation_that_the_cpu_refuses() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    found = fault(refused.value, "sft_small")
    assert found.what == f"rank 0: the machine's memory is full, asked for {4 * 2**20:.2f} GiB more"
    assert "lora=true saves" in found.fix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_allocation_that_a_gpu_refuses() -> None:
    world = World(0, 0, 1, 1, torch.device("cuda", 0))
    with pytest.raises(torch.OutOfMemoryError) as refused:
        torch.empty(2**42, device=world.device)
    found = fault(refused.value, "sft_small", world=world)
    assert found.what == "rank 0: the memory of cuda:0 is full, asked for 16384.00 GiB more"


def test_python_itself_has_no_memory() -> None:
    assert fault(MemoryError(), "sft_small").what == "rank 0: the machine's memory is full"


def test_a_model_of_unknown_shape_gets_advice_without_figures() -> None:
    found = fault(MemoryError(), "sft_small", known=False)
    assert "GiB" not in str(found)
    assert found.fix.startswith("lower train.micro_batch_size with more train.grad_accum_steps")


def test_other_errors_pass() -> None:
    config = load("sft_small")
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("odd"), KeyboardInterrupt()):
        with pytest.raises(type(error)), memory_advice(config, None, resolve_geometry(config, 1), CPU):
            raise error
