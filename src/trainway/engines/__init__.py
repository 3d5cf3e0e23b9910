"""Engines: how a model and its optimisers are spread over processes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trainway.config.schema import RunConfig
from trainway.engines.base import Learner
from trainway.engines.ddp import DDPLearner
from trainway.engines.deepspeed import DeepSpeedLearner
from trainway.engines.fsdp import FSDPLearner, shard, sharding_mesh
from trainway.engines.precision import choose_precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World
from trainway.models.blocks import blocks
from trainway.models.load import InitialWeights, allocate


def build_learner(
    config: RunConfig, module: nn.Module, model: PreTrainedModel, world: World, weights: InitialWeights
) -> Learner:
    """Put `module` (a summed loss over `model`, on the meta device) under the engine that the config names.

    Room for the weights is made here, where it is known which of them each rank holds, and filled by `weights`.
    """
    precision = choose_precision(config.train.precision, world.device)
    learner: SingleLearner | DeepSpeedLearner
    match engine_name(config, world):
        case "zero2" | "zero3":
            learner = DeepSpeedLearner(config, module, model, world, precision)
        case "fsdp":
            mesh = sharding_mesh(config.engine, world)
            shard(module, blocks(model), config.engine, precision, mesh)
            weights_device = "cpu" if config.engine.cpu_offload == "all" else None
            allocate(module, model, device=world.device, weights_device=weights_device)
            learner = FSDPLearner(module, model, config.optim, world, precision, mesh)
        case "ddp":
            allocate(module, model, device=world.device)
            learner = DDPLearner(module, model, config.optim, world, precision)
        case _:
            allocate(module, model, device=world.device)
            learner = SingleLearner(module, model, config.optim, world, precision)
    with torch.no_grad():
        weights(learner.pieces.items())
    if isinstance(learner, DeepSpeedLearner):
        learner.publish()
    return learner


def engine_name(config: RunConfig, world: World) -> str:
    """The engine in use: `auto` is single on one process and ddp on several; one process needs no DDP."""
    if config.engine.name in ("fsdp", "zero2", "zero3"):
        return config.engine.name
    return "single" if world.world_size == 1 else "ddp"
