"""A frozen base in 4 bits, for adapters to be trained on (QLoRA), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trainway.checkpoint.pieces import Piece
from trainway.errors import EnvironmentFault
from trainway.models.base import BaseModel, experts_on
from trainway.models.base_import import quiet_transformers


def load_quantized(
    base: BaseModel, *, device: torch.device | str, attention: str | None = None
) -> PreTrainedModel:
    """The base on `device`, its blocks' linear layers in 4 bits (NF4, constants quantised again), the rest in bf16.

    Dettmers et al. 2023, arXiv 2305.14314. Products are computed in bf16. Experts of a mixture that are no linear
    layers stay in bf16. attention: as in `build_base`.

    Raises:
        EnvironmentFault: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "lora.quantize=4bit needs bitsandbytes",
            "it is not installed",
            "pip install 'trainway[qlora]', or set lora.quantize=none",
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.directory,
            quantization_config=quantization,
            dtype=torch.bfloat16,
            device_map={"": str(device)},
            local_files_only=True,
            trust_remote_code=base.trust_remote_code,
            experts_implementation=experts_on(torch.device(device)),
            **({"attn_implementation": attention} if attention else {}),
        )
    return model.requires_grad_(False).eval()


def dequantized_weights(base: BaseModel) -> StoredWeights:
    """The base's weights as a run with lora.quantize=4bit has them: rounded to 4 bits, as plain numbers.

    Held in memory in bf16, on the GPU while they are made if there is one.

    Raises:
        EnvironmentFault: bitsandbytes is not installed.
    """
    model = load_quantized(base, device="cuda" if torch.cuda.is_available() else "cpu")
    with quiet_transformers():
        plain: PreTrainedModel = model.dequantize()
    return StoredWeights({name: tensor.cpu() for name, tensor in plain.state_dict().items()})


@dataclass(frozen=True)
class StoredWeights:
    """Initial weights out of memory, by their names in the base model."""

    state: Mapping[str, torch.Tensor]

    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        for name, piece in pieces:
            piece.copy_from(self.state[name])


class LoadedWeights:
    """Initial weights of a base that is in memory already."""

    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        for _ in pieces:
            pass
