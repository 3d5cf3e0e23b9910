"""A trained adapter with its base: loaded together, and merged into one plain model."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from trainway.checkpoint.adapter import ADAPTER_CONFIG, base_name, is_adapter_tensor
from trainway.checkpoint.weights import load_model, model_pieces
from trainway.errors import ConfigError, DataError
from trainway.models.base import BaseModel, BaseWeights, build_base, find_base
from trainway.models.discriminator import DiscriminatorWeights, build_discriminator
from trainway.models.load import InitialWeights, allocate
from trainway.models.lora import inject


def find_adapter_base(directory: Path, *, cache: Path, trust_remote_code: bool = False) -> BaseModel:
    """The model that the adapter in `directory` was trained on, by its configuration.

    Raises:
        ConfigError, DataError, EnvironmentFault: as `find_base`; DataError if the configuration cannot be read.
    """
    config = _read_config(directory)
    if not config.base_model_name_or_path:
        raise _no_base(directory, "it names none", "")
    try:
        return find_base(
            config.base_model_name_or_path,
            revision=config.revision,
            trust_remote_code=trust_remote_code,
            cache=cache,
            needs_tokenizer=False,
        )
    except ConfigError as error:
        raise _no_base(directory, error.what, error.why) from error


def load_adapted(
    directory: Path, base: BaseModel, dtype: torch.dtype, base_weights: InitialWeights | None = None
) -> PreTrainedModel:
    """The base in `dtype` with the adapter in `directory` in it, on the CPU, for evaluation.

    An adapter of a discriminator comes in one, whose head is of at least fp32. base_weights: instead of the base's own.

    Raises:
        DataError: the adapter's files are damaged, or their tensors are not, each by its name, those of the adapter.
    """
    config = _read_config(directory)
    weights: InitialWeights = base_weights or BaseWeights(base)
    if config.task_type == "SEQ_CLS":
        model, weights = build_discriminator(base, dtype=dtype), DiscriminatorWeights(weights, seed=0)
    else:
        model = build_base(base, dtype=dtype)
    inject(model, config)
    allocate(model, model, device="cpu")
    pieces = model_pieces(model)
    weights((base_name(name), piece) for name, piece in pieces.items() if not is_adapter_tensor(name))
    load_model(model, directory)
    return model.eval()


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to the weight that it adapts, in place: `model` is a plain one afterwards.

    Each weight is merged in fp32 and rounded to its own type once; no more than one is in memory twice.

    Raises:
        DataError: a merged weight is not finite.
    """
    wrapped = {
        name: m for name, m in model.named_modules() if isinstance(m, (LoraLayer, ModulesToSaveWrapper))
    }
    for name, module in wrapped.items():
        owner, _, own = name.rpartition(".")
        if isinstance(wrapped.get(owner), ParamWrapper):
            continue  # taken with the one that wraps it
        if isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[module.active_adapters[0]]
            plain.to(next(module.original_module.parameters()).dtype)
        else:
            plain = _merged(name, module)  # type: ignore[arg-type]  # every LoraLayer is a module, too
        setattr(model.get_submodule(owner), own, plain)
    del model.peft_config
    model.requires_grad_(False)


def _merged(name: str, layer: nn.Module) -> nn.Module:
    while isinstance(layer, ParamWrapper):
        _merge_one(f"{base_name(name + '.')}{layer.parameter_name}", layer, layer.get_param())
        layer = layer.base_layer
    if not isinstance(layer, LoraLayer):
        return layer
    plain: nn.Module = layer.get_base_layer()
    _merge_one(f"{name}.weight", layer, plain.weight)  # type: ignore[arg-type]
    return plain


def _merge_one(name: str, layer: LoraLayer, weight: nn.Parameter) -> None:
    dtype = weight.dtype
    weight.data = weight.data.float()
    layer.merge()
    weight.data = weight.data.to(dtype)
    if not weight.isfinite().all():
        raise DataError(
            f"{name} is not finite with its adapter",
            f"the adapter is broken, or its sum with the weight does not fit into {dtype}",
            "use another checkpoint",
        )


def _read_config(directory: Path) -> peft.LoraConfig:
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory / ADAPTER_CONFIG} cannot be read", f"{error}", "use another checkpoint"
        ) from error
    if not isinstance(config, peft.LoraConfig):
        raise DataError(
            f"{directory / ADAPTER_CONFIG} describes a {config.peft_type.value}",
            "only LoRA is known",
            "merge it by peft",
        )
    config.inference_mode = False
    return config


def _no_base(directory: Path, what: str, why: str) -> ConfigError:
    return ConfigError(
        f"the base of the adapter in {directory} was not found",
        ": ".join(part for part in (what, why) if part),
        f"put it there, or correct base_model_name_or_path in {ADAPTER_CONFIG}",
    )
