"""Which attention a model gets: the one that model.attention names, or the best that gives the right results."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.attention import PACKED_ATTENTION, use_packed_attention
from trainway.models.tiny import packing_fault

_KNOWN = frozenset(
    "cohere cohere2 deepseek_v3 gemma gemma2 gemma3_text gpt2 gpt_neox gpt_oss granite llama mistral mixtral olmo2 "
    "olmo3 phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2".split()
)
"""Model types that hand all of their attention's features to transformers' interface, so that ours can honour them."""


def use_attention(
    model: PreTrainedModel, name: str, packed: bool, device: torch.device | str | None = None
) -> str:
    """Install the attention that `name` (model.attention) asks for, and return the name of the one installed.

    auto: ours for architectures known to honour transformers' interface, else sdpa, else eager. packed: whether rows
    hold several documents; then only what keeps them apart in a trial on a small copy of the model is taken (see
    `tiny.packing_fault`), and so it is for ours. The model may be on the meta device; `device`: where it will run,
    by default a GPU if there is one.

    Raises:
        ConfigError: the model and this attention, or packed documents, do not go together.
        EnvironmentFault: flash_attention_2 without its package.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "auto":
        return _choose(model, packed)
    _check(model, name, device)
    if name == "packed" or packed:
        fault = packing_fault(model, _implementation(name), _trial_device(name, device))
        if fault is not None:
            raise _refusal(model, name, fault, packed)
    _install(model, name)
    return name


def _choose(model: PreTrainedModel, packed: bool) -> str:
    ours = model.config.model_type in _KNOWN and not _attention_dropout(model.config)
    plain = plain_attention(model)
    faults = []
    for name in ("packed", plain) if ours else (plain,):
        if name == "packed" or packed:
            fault = packing_fault(model, _implementation(name))
            if fault is not None:
                faults.append(fault)
                continue
        _install(model, name)
        return name
    raise _refusal(model, "auto", faults[-1], packed)


def plain_attention(model: PreTrainedModel) -> str:
    """transformers' own attention for this model on any device."""
    return "sdpa" if model._supports_sdpa and not _has_softcap(model.config) else "eager"


def _check(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Refuse what this model, this machine or this attention is known not to do."""
    kind = model.config.model_type
    asked = f"model.attention={name} does not work for {kind}"
    fix = "set model.attention=auto"
    if name == "packed" and (dropout := _attention_dropout(model.config)):
        why = f"its configuration has an attention dropout of {dropout}, and packed attention has none"
        raise ConfigError(
            asked, why, "set model.attention=sdpa, or the dropout in the model's config.json to 0"
        )
    if name == "sdpa" and _has_softcap(model.config):
        raise ConfigError(asked, "it caps its attention scores, which sdpa cannot", fix)
    supported = {
        "sdpa": model._supports_sdpa,
        "flash_attention_2": model._supports_flash_attn,
        "flex_attention": model._supports_flex_attn,
    }
    if not supported.get(name, True):
        raise ConfigError(asked, "transformers has no such attention for this architecture", fix)
    if name in ("flash_attention_2", "flex_attention"):
        if any(parameter.rpartition(".")[2] == "sinks" for parameter, _ in model.named_parameters()):
            raise ConfigError(asked, "its attention sinks have no proven gradients there", fix)
        if device.type == "cpu":
            why = (
                f"{name} has no backward pass on CPUs" if name == "flex_attention" else f"{name} needs a GPU"
            )
            raise ConfigError(f"model.attention={name} does not work on a CPU", why, fix)
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise EnvironmentFault(
            "model.attention=flash_attention_2 needs the package flash-attn",
            "it is not installed",
            "pip install flash-attn --no-build-isolation, or set model.attention=auto",
        )


def _refusal(model: PreTrainedModel, name: str, fault: str, packed: bool) -> ConfigError:
    kind = model.config.model_type
    if not packed:
        return ConfigError(
            f"model.attention={name} does not work for {kind}", fault, "set model.attention=auto"
        )
    return ConfigError(
        f"{kind} cannot keep packed documents apart under model.attention={name}",
        fault,
        "set data.packing=none, or another model.attention"
        if name != "auto"
        else "set data.packing=none: one conversation a row",
    )


def _install(model: PreTrainedModel, name: str) -> None:
    if name == "packed":
        use_packed_attention(model)
    else:
        model.set_attn_implementation(name)


def _implementation(name: str) -> str:
    return PACKED_ATTENTION if name == "packed" else name


def _trial_device(name: str, device: torch.device) -> torch.device:
    """Where the trial runs: on the CPU, unless the implementation lives on GPUs alone."""
    return device if name in ("flash_attention_2", "flex_attention") else torch.device("cpu")


def _has_softcap(config: PreTrainedConfig) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None


def _attention_dropout(config: PreTrainedConfig) -> float:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
    return max(float(getattr(config, name, None) or 0.0) for name in names)
