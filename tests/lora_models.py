"""Small random models of three families, and adapters in them, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.weights import model_pieces
from trainway.config.schema import LoraConfig
from trainway.models.load import allocate
from trainway.models.lora import AdaptedWeights, inject_lora

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "gpt-oss": GptOssConfig(
        **{**SHAPE, "max_position_embeddings": 131072},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
    ),
}
EXPERTS = ("1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj")


def plain(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, biases and norms included: nothing is zero or one by chance."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.15)
    model.tie_weights()
    return model.to(dtype)


class Stored:
    """A base's weights out of memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        for name, piece in pieces:
            piece.copy_from(self.state[name])


def on_meta(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)


def adapted(
    base: PreTrainedModel, family: str, lora: LoraConfig, seed: int = 3, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """`base` with adapters, as a run makes it: injected on the meta device, then given values."""
    model = on_meta(family, dtype)
    inject_lora(model, lora, base="org/base")
    allocate(model, model, device="cpu")
    AdaptedWeights(Stored(base.state_dict()), seed)(model_pieces(model).items())
    return model.eval()


def stir(model: PreTrainedModel, seed: int = 5) -> None:
    """Give every trained tensor values as if it had been trained: no B is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(tokens()).logits
    return result.float()


def save_base(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
