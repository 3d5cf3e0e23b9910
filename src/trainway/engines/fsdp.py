"""Fully sharded: every rank holds some rows of each weight, gradient and optimiser state (PyTorch FSDP2).

A block's weights are gathered for its forward and backward pass alone. `hybrid` shards over groups of ranks, usually
those of one machine, that hold the same shards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trainway.checkpoint.adapter import saved_pieces
from trainway.checkpoint.optimizer_state import optimizer_slots
from trainway.checkpoint.pieces import Part, Piece
from trainway.checkpoint.snapshot import Snapshot
from trainway.config.schema import EngineConfig, OptimConfig
from trainway.engines.hooks import without_hooks
from trainway.engines.precision import Precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World
from trainway.errors import ConfigError
from trainway.muon import Spread


class FSDPLearner(SingleLearner):
    """A learner over `module`, which `shard` has sharded and whose weights have been given values since."""

    is_sharded = True

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        optim: OptimConfig,
        world: World,
        precision: Precision,
        mesh: DeviceMesh,
    ):
        self._mesh = mesh
        self._root = cast(FSDPModule, module)
        self._sharded: list[tuple[Tensor, Tensor]] = []  # FSDP's parameter, and this rank's rows of it
        self._whole_rows: dict[int, int] = {}  # by id of this rank's rows: how many the whole parameter has
        super().__init__(module, model, optim, world, precision)

    def step(self, lr_factor: float, max_norm: float, accept: Any) -> float:
        for parameter, rows in self._sharded:
            rows.grad = None if parameter.grad is None else _rows(parameter.grad)
            parameter.grad = None
        return super().step(lr_factor, max_norm, accept)

    def read(self, directory: Path, *, weights_only: bool = False) -> None:
        self._let_go()
        super().read(directory, weights_only=weights_only)

    def exchange(self, other: Mapping[str, Tensor]) -> None:
        self._let_go()
        super().exchange(other)

    @contextmanager
    def whole(self) -> Iterator[None]:
        self._let_go()
        try:
            for part in self._parts():
                part.unshard()
            with without_hooks(self.model), super().whole():
                yield
        finally:
            self._let_go()

    def snapshot(self) -> Snapshot:
        shards = self._mesh["shard"]
        replica = self._mesh.get_local_rank("replicate") if self._mesh.ndim > 1 else 0
        part = Part(shards.get_local_rank(), shards.size()) if replica == 0 else None
        return Snapshot(
            saved_pieces(self.model, self.pieces), optimizer_slots(self.optimizers, self.pieces), part
        )

    def _let_go(self) -> None:
        """Free what is gathered: a forward pass without a backward one leaves it, and would not gather new values."""
        for part in self._parts():
            part.reshard()

    def _parts(self) -> list[FSDPModule]:
        return [module for module in self.module.modules() if isinstance(module, FSDPModule)]

    def _exchange(self, sync: bool) -> AbstractContextManager[Any]:
        # Gradients are scattered after every micro-batch: kept whole until the last, they would need the memory of the
        # whole model. Only the sum over replicas waits.
        self._root.set_requires_all_reduce(sync)
        return nullcontext()

    def _pieces(self) -> dict[str, Piece]:
        # The optimisers work on plain tensors that share FSDP's memory: DTensor's dispatch costs more than the update
        # of a small tensor, and everything that reads or writes a piece stays the same as on one process.
        shards = self._mesh["shard"]
        pieces = {}
        for name, parameter in self.model.named_parameters():
            rows = nn.Parameter(_rows(parameter.detach()), requires_grad=parameter.requires_grad)
            self._sharded.append((parameter, rows))
            self._whole_rows[id(rows)] = parameter.shape[0]
            chunk = -(-parameter.shape[0] // shards.size())
            start = min(shards.get_local_rank() * chunk, parameter.shape[0])
            assert len(rows) == min(chunk, parameter.shape[0] - start), (
                f"{name} is not cut as torch.chunk does"
            )
            pieces[name] = Piece.rows(rows, tuple(parameter.shape), start)
        return pieces

    def _spread(self) -> Spread:
        replicas = self._mesh.get_group("replicate") if self._mesh.ndim > 1 else None
        return Spread(self._mesh.get_group("shard"), replicas, self.world.device)

    def _num_rows(self, parameter: Tensor) -> int:
        return self._whole_rows[id(parameter)]


def sharding_mesh(engine: EngineConfig, world: World) -> DeviceMesh:
    """The ranks as a mesh of `shard`, or under hybrid of `replicate` x `shard`.

    Raises ConfigError when the ranks are no multiple of a group.
    """
    if engine.sharding == "full":
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    group = engine.shard_ranks or world.local_world_size
    if world.world_size % group:
        raise ConfigError(
            f"engine.shard_ranks {group} does not divide the {world.world_size} ranks",
            "under hybrid every group of so many ranks holds the whole model",
            "set engine.shard_ranks to a divisor of the ranks, or engine.sharding=full",
        )
    shape = (world.world_size // group, group)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    module: nn.Module, blocks: nn.ModuleList, engine: EngineConfig, precision: Precision, mesh: DeviceMesh
) -> None:
    """Cut every parameter of `module`, a summed loss, into rows, in place; those of each block are gathered together.

    Meant for a module on the meta device: nothing is allocated. Under bf16 or fp16 a block's weights travel in that
    type and its gradients are summed in fp32; what lies outside the blocks stays fp32, where autocast casts it as it
    does on one process.
    """
    if mesh.device_type == "cpu":
        _give_freed_memory_back()
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    offload: OffloadPolicy = OffloadPolicy()
    if engine.cpu_offload == "all":
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=engine.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    for part in (module, *blocks):
        # losses are sums: gradients are summed too, where FSDP would average (gloo knows no average either)
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    if hasattr(module, "generate"):
        register_fsdp_forward_method(module, "generate")


def _rows(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor  # `to_local` would be an operation that autograd records


def _give_freed_memory_back() -> None:
    # glibc keeps freed blocks of up to 32 MiB for itself, and weights that were gathered for a moment would pile up: a
    # rank of two held three quarters of one process's memory instead of six tenths.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_MMAP_THRESHOLD = -3
        mallopt(M_MMAP_THRESHOLD, 4 << 20)
