"""Engines: how a model and its optimisers are spread over processes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trainway.config.schema import RunConfig
from trainway.engines.base import Learner
from trainway.engines.ddp import DDPLearner
from trainway.engines.precision import choose_precision
from trainway.engines.single import SingleLearner
from trainway.engines.world import World


def build_learner(config: RunConfig, module: nn.Module, model: PreTrainedModel, world: World) -> Learner:
    """Put `module` (a summed loss over `model`) under the engine that the config names."""
    precision = choose_precision(config.train.precision, world.device)
    match engine_name(config, world):
        case "ddp":
            return DDPLearner(module, model, config.optim, world, precision)
        case _:
            return SingleLearner(module, model, config.optim, world, precision)


def engine_name(config: RunConfig, world: World) -> str:
    """The engine in use: `auto` is single on one process and ddp on several; one process needs no DDP."""
    return "single" if world.world_size == 1 else "ddp"
