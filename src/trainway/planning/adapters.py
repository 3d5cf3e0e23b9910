"""How many parameters low-rank adapters have on a model of a given shape (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainway.config.schema import LoraConfig
from trainway.planning.shapes import ModelShape, Weight

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Adapted:
    """Parameters of a model that is tuned by adapters."""

    trainable: int
    matmul: int
    """Those of adapters that a token is multiplied with: of an expert's adapters, only those of its experts."""
    quantized: int
    """Weights of the frozen model that 4 bits may hold: the linear layers of its blocks."""


def count_adapters(shape: ModelShape, lora: LoraConfig) -> Adapted:
    """What `lora` trains in a model of `shape`: r (in + out) for a matrix, as much for each expert of a stack.

    Names match as in `models.lora`; one that lands nowhere counts nothing here, and is refused there.
    """
    active = {shape.prefix + str(place): layer.active for place, layer in enumerate(shape.layers)}
    adapters, met = 0, 0.0
    for weight in shape.weights():
        size = _adapter_size(weight, lora, shape)
        block = ".".join(weight.name.split(".")[: shape.prefix.count(".") + 1])
        adapters += size
        met += size * (active.get(block, 1.0) if len(weight.shape) == 3 else 1.0)
    copies = sum(weight.size for weight in shape.weights() if _is_saved(weight, lora))
    quantized = sum(w.size for layer in shape.layers for w in layer.weights if w.kind == "linear")
    return Adapted(adapters + copies, round(met) + copies, quantized if lora.quantize == "4bit" else 0)


def adapted_ranks(shape: ModelShape, lora: LoraConfig, place: int) -> dict[str, int]:
    """The linear modules of block `place` that have an adapter, by their names below it, with its rank."""
    found = {}
    for weight in shape.layers[place].weights:
        module = weight.name.removesuffix(".weight")
        whole = f"{shape.prefix}{place}.{module}"
        if weight.kind == "linear" and _names_module(whole, lora, shape):
            found[module] = _rank(whole, lora)
    return found


def _adapter_size(weight: Weight, lora: LoraConfig, shape: ModelShape) -> int:
    if _is_saved(weight, lora):
        return 0
    module = weight.name.removesuffix(".weight")
    if weight.kind == "linear" and _names_module(module, lora, shape):
        size = _rank(module, lora) * sum(weight.shape)
        rows = weight.shape[1] if shape.family == "gpt2" else weight.shape[0]  # its matrices are [in, out]
        return size + rows if lora.use_dora else size
    if any(_ends_with(weight.name, target) for target in lora.target_parameters):
        stacked = weight.shape[0] if len(weight.shape) == 3 else 1
        return _rank(weight.name, lora) * stacked * sum(weight.shape[-2:])
    return 0


def _names_module(module: str, lora: LoraConfig, shape: ModelShape) -> bool:
    if ALL_LINEAR in lora.target_modules:
        return module.startswith(shape.prefix)
    return any(
        re.fullmatch(target, module) is not None if _REGEX.search(target) else _ends_with(module, target)
        for target in lora.target_modules
    )


def _is_saved(weight: Weight, lora: LoraConfig) -> bool:
    if not lora.modules_to_save:
        return False
    parts = weight.name.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(_ends_with(owner, wanted) for wanted in lora.modules_to_save for owner in owners)


def _rank(name: str, lora: LoraConfig) -> int:
    for pattern, rank in lora.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return lora.r


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
