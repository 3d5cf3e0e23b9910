"""Data parallel: every rank holds the whole model and takes its share of each micro-batch (PyTorch DDP)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trainway.config.schema import OptimConfig
from trainway.engines.precision import Precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World
from trainway.muon import Spread


class DDPLearner(SingleLearner):
    """A single learner whose gradients are summed over the ranks during the step's last backward pass."""

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        optim: OptimConfig,
        world: World,
        precision: Precision,
    ):
        super().__init__(module, model, optim, world, precision)
        self._ddp = DistributedDataParallel(
            module,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        self.module = self._ddp

    def backward(self, loss: Tensor, *, scale: float) -> None:
        # DDP averages over the ranks; our losses are sums, so the mean is turned back into one.
        super().backward(loss, scale=scale * self.world.world_size)

    def _spread(self) -> Spread:
        return Spread(replicas=dist.group.WORLD)

    def _exchange(self, sync: bool) -> AbstractContextManager[Any]:
        return nullcontext() if sync else self._ddp.no_sync()
