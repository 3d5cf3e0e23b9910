"""The decoder blocks of any model, found by what they are and not by the name of a class."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trainway.errors import ConfigError


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of `model`: what is sharded, compiled and checkpointed as a unit.

    Of the outermost lists with as many modules as the model has layers, it is the one with the most parameters.

    Raises:
        ConfigError: the model has no such list.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        module
        for name, module in lists
        if len(module) == num_layers and not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    found = max(outermost, key=_num_parameters, default=None)
    if found is None or 2 * _num_parameters(found) <= _num_parameters(model) - _outside(model):
        raise ConfigError(
            f"{type(model).__name__} has no list of {num_layers} blocks",
            "its layers are no torch.nn.ModuleList that holds most of its weights",
            "use a model of a family that transformers itself implements",
        )
    return found


def _outside(model: PreTrainedModel) -> int:
    """Parameters of the embeddings and the head."""
    ends = {
        id(end): end
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
        if end is not None
    }
    weights = {id(p): p.numel() for end in ends.values() for p in end.parameters()}
    return sum(weights.values())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
