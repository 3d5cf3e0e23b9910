"""Engines: how a model and its optimisers are spread over processes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trainway.config.schema import RunConfig
from trainway.engines.base import Learner
from trainway.engines.ddp import DDPLearner
from trainway.engines.fsdp import FSDPLearner, shard, sharding_mesh
from trainway.engines.precision import choose_precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World
from trainway.models.load import materialize


def build_learner(config: RunConfig, module: nn.Module, model: PreTrainedModel, world: World) -> Learner:
    """Put `module` (a summed loss over `model`, on the meta device) under the engine that the config names.

    The weights are made here, where it is known which of them each rank holds: the same on any number of ranks.
    """
    precision = choose_precision(config.train.precision, world.device)
    match engine_name(config, world):
        case "fsdp":
            mesh = sharding_mesh(config.engine, world)
            shard(module, model.get_submodule(model.base_model_prefix).layers, config.engine, precision, mesh)
            weights_device = "cpu" if config.engine.cpu_offload else None
            materialize(
                module,
                model,
                config.model,
                seed=config.seed,
                device=world.device,
                weights_device=weights_device,
            )
            return FSDPLearner(module, model, config.optim, world, precision, mesh)
        case "ddp":
            materialize(module, model, config.model, seed=config.seed, device=world.device)
            return DDPLearner(module, model, config.optim, world, precision)
        case _:
            materialize(module, model, config.model, seed=config.seed, device=world.device)
            return SingleLearner(module, model, config.optim, world, precision)


def engine_name(config: RunConfig, world: World) -> str:
    """The engine in use: `auto` is single on one process and ddp on several; one process needs no DDP."""
    if config.engine.name == "fsdp":
        return "fsdp"
    return "single" if world.world_size == 1 else "ddp"
