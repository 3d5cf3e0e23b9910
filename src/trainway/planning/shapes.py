"""The shape of a model without the model: every weight by name, from a configuration of ours or a config.json (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainway.config.schema import ModelConfig
from trainway.errors import DataError

Kind = Literal["linear", "experts", "expert_biases", "embedding", "other"]


class Weight(NamedTuple):
    """One parameter: its name below its block or below the model, its shape, and what it is."""

    name: str
    shape: tuple[int, ...]
    kind: Kind = "other"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One decoder block. `kept` and `products`: feed-forward values that autograd keeps for one token, in all and of
    matrix products alone; `active`: the share of the experts' weights that one token meets."""

    weights: tuple[Weight, ...]
    kept: int
    products: int
    active: float = 1.0
    window: int | None = None
    """Tokens that sliding attention looks back; None: all."""

    @cached_property
    def matrices(self) -> int:
        return sum(weight.size for weight in self.weights if len(weight.shape) > 1)


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer as transformers holds it in memory."""

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    tie_embeddings: bool
    prefix: str
    """What stands before a block's number in the names of its weights."""
    layers: tuple[Layer, ...]
    outside: tuple[Weight, ...]
    """Weights of no block, with their full names."""

    @cached_property
    def size(self) -> int:
        """Parameters in all."""
        return sum(weight.size for weight in self.weights())

    def weights(self) -> Iterator[Weight]:
        """Every weight with its full name."""
        yield from self.outside
        for place, layer in enumerate(self.layers):
            for weight in layer.weights:
                yield weight._replace(name=f"{self.prefix}{place}.{weight.name}")


def new_shape(model: ModelConfig, vocab_size: int) -> ModelShape:
    """The shape of the model that `models.load.build_model` makes."""
    shape = read_shape(
        {
            "model_type": model.architecture,
            "vocab_size": vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.intermediate_size,
            "max_position_embeddings": model.max_seq_len,
            "tie_word_embeddings": model.tie_embeddings,
        }
    )
    assert shape is not None
    return shape


def shape_in(directory: str | Path) -> ModelShape | None:
    """The shape of a model in Hugging Face's format; None without a config.json there, or for an unknown family.

    Raises:
        DataError: config.json is not JSON, or lacks a number that its family needs.
    """
    path = Path(directory).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return read_shape(config) if isinstance(config, dict) else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {path}", f"{type(error).__name__}: {error}", "copy the model's directory again"
        ) from None


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a config.json of transformers describes; None for a family that is not in `FAMILIES`.

    Raises:
        KeyError: a number that the family needs is missing.
    """
    name = config.get("model_type")
    if name == "gpt2":
        return _gpt2(config)
    if name not in FAMILIES:
        return None
    family = FAMILIES[name]
    heads = config["num_attention_heads"]
    sizes = _Sizes(
        family=family,
        config=config,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        width=config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
    )
    tied = bool(config.get("tie_word_embeddings", family.tied))
    vocab = config["vocab_size"]
    outside = [Weight("model.embed_tokens.weight", (vocab, sizes.hidden), "embedding")]
    outside += sizes.norm("model.norm") if family.norms else []
    if not tied:
        outside.append(Weight("lm_head.weight", (vocab, sizes.hidden), "linear"))
    return ModelShape(
        family=str(name),
        vocab_size=vocab,
        hidden_size=sizes.hidden,
        num_heads=heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.width,
        max_seq_len=config.get("max_position_embeddings") or 0,
        tie_embeddings=tied,
        prefix="model.layers.",
        layers=tuple(sizes.layer(place) for place in range(config["num_hidden_layers"])),
        outside=tuple(outside),
    )


@dataclass(frozen=True)
class Family:
    """What sets a family of transformers apart; the names are those of its weights."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    attention_bias: bool | str = False
    """Biases of q, k and v: always, never, or by this key."""
    output_bias: bool | str = False
    head_norm: Literal["", "head", "all"] = ""
    """RMSNorm of queries and keys: none, shared by the heads, or over all of them."""
    sinks: bool = False
    fused: Literal["", "both", "mlp"] = ""
    """Matrices that are one: q, k and v with gate and up (Phi-3), or gate and up alone."""
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_bias: bool | str = False
    experts: str = ""
    """Key of the number of experts; empty means a dense model."""
    block: str = "mlp"
    router: str = "gate"
    expert_bias: bool = False
    expert_width: str = "intermediate_size"
    transposed: bool = False
    """Experts' matrices as [experts, in, out]."""
    shared: bool = False
    tied: bool = False
    head_dim: int | None = None


_LLAMA = Family(attention_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias")
_GEMMA = Family(attention_bias="attention_bias", output_bias="attention_bias", tied=True, head_dim=256)
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OLMO = Family(
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    attention_bias="attention_bias",
    output_bias="attention_bias",
    head_norm="all",
)
_QWEN_MOE = Family(experts="num_experts", expert_width="moe_intermediate_size")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(),
    "mixtral": Family(experts="num_local_experts"),
    "qwen2": Family(attention_bias=True),
    "qwen3": Family(attention_bias="attention_bias", output_bias="attention_bias", head_norm="head"),
    "qwen2_moe": replace(_QWEN_MOE, attention_bias="qkv_bias", shared=True),
    "qwen3_moe": replace(
        _QWEN_MOE, attention_bias="attention_bias", output_bias="attention_bias", head_norm="head"
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=_SANDWICH),
    "gemma3_text": replace(_GEMMA, norms=_SANDWICH, head_norm="head"),
    "phi3": Family(fused="both"),
    "gpt_oss": Family(
        attention_bias="attention_bias",
        output_bias="attention_bias",
        sinks=True,
        experts="num_local_experts",
        router="router",
        expert_bias=True,
        transposed=True,
    ),
    "olmo": replace(_OLMO, norms=(), head_norm=""),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "granite": _LLAMA,
    "granitemoe": Family(
        attention_bias="attention_bias",
        output_bias="attention_bias",
        experts="num_local_experts",
        block="block_sparse_moe",
        router="router",
    ),
    "smollm3": replace(_LLAMA, tied=True),
    "cohere": replace(_GEMMA, norms=("input_layernorm",), head_dim=None),
    "starcoder2": Family(
        norm_bias=True,
        attention_bias="use_bias",
        output_bias="use_bias",
        mlp_names=("c_fc", "c_proj"),
        mlp_bias="use_bias",
        tied=True,
    ),
    "glm4": Family(
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
        attention_bias="attention_bias",
        fused="mlp",
    ),
}
"""Families by transformers' model_type. GPT-2, whose names are all different, is read apart."""


def is_mixture(family: str) -> bool:
    """True for a family whose blocks hold experts."""
    return family in FAMILIES and bool(FAMILIES[family].experts)


_DEFAULT_ON = {"qkv_bias", "use_bias"}
"""Keys of biases that are there when a config.json does not say."""


@dataclass(frozen=True)
class _Sizes:
    """The numbers of one model, and its blocks built from them."""

    family: Family
    config: Mapping[str, Any]
    hidden: int
    heads: int
    kv_heads: int
    width: int

    def layer(self, place: int) -> Layer:
        weights = [*self._attention(), *(w for name in self.family.norms for w in self.norm(name))]
        kinds = self.config.get("layer_types")
        sliding = (
            kinds[place] == "sliding_attention" if kinds else self.config.get("use_sliding_window", True)
        )
        window = self.config.get("sliding_window") if sliding else None
        if self.family.experts and not self._is_dense(place):
            return self._mixture(weights, window)
        inner = self.config["intermediate_size"]
        gated = len(self.family.mlp_names) == 3
        kept, products = (4 * inner, 2 * inner) if gated else (2 * inner, inner)
        return Layer((*weights, *self._feed_forward("mlp", inner)), kept, products, window=window)

    def norm(self, name: str, size: int = 0) -> list[Weight]:
        size = size or self.hidden
        parts = ("weight", "bias") if self.family.norm_bias else ("weight",)
        return [Weight(f"{name}.{part}", (size,)) for part in parts]

    def _is_dense(self, place: int) -> bool:
        step = self.config.get("decoder_sparse_step") or 1
        return place in (self.config.get("mlp_only_layers") or ()) or (place + 1) % step != 0

    def _says(self, key: bool | str) -> bool:
        return bool(self.config.get(key, key in _DEFAULT_ON)) if isinstance(key, str) else key

    def _linear(self, name: str, rows: int, columns: int, bias: bool | str) -> list[Weight]:
        found = [Weight(f"{name}.weight", (rows, columns), "linear")]
        return [*found, Weight(f"{name}.bias", (rows,))] if self._says(bias) else found

    def _attention(self) -> list[Weight]:
        family, outer, inner = self.family, self.heads * self.width, self.kv_heads * self.width
        found: list[Weight] = []
        if family.fused == "both":
            found += self._linear("self_attn.qkv_proj", outer + 2 * inner, self.hidden, False)
        else:
            for name, rows in (("q_proj", outer), ("k_proj", inner), ("v_proj", inner)):
                found += self._linear(f"self_attn.{name}", rows, self.hidden, family.attention_bias)
        found += self._linear("self_attn.o_proj", self.hidden, outer, family.output_bias)
        if family.head_norm == "head":
            found += [Weight(f"self_attn.{name}.weight", (self.width,)) for name in ("q_norm", "k_norm")]
        elif family.head_norm == "all":
            found += [
                Weight("self_attn.q_norm.weight", (outer,)),
                Weight("self_attn.k_norm.weight", (inner,)),
            ]
        return [*found, Weight("self_attn.sinks", (self.heads,))] if family.sinks else found

    def _feed_forward(self, block: str, inner: int) -> list[Weight]:
        *into, out = self.family.mlp_names
        rows = [(name, inner) for name in into]
        if self.family.fused:
            rows = [("gate_up_proj", 2 * inner)]
        found: list[Weight] = []
        for name, size in rows:
            found += self._linear(f"{block}.{name}", size, self.hidden, self.family.mlp_bias)
        return found + self._linear(f"{block}.{out}", self.hidden, inner, self.family.mlp_bias)

    def _mixture(self, weights: list[Weight], window: int | None) -> Layer:
        family, config, hidden = self.family, self.config, self.hidden
        # a config.json calls it by its family's name or by the newer common one
        count = config.get(family.experts) or config["num_local_experts"]
        inner, each = config[family.expert_width], config["num_experts_per_tok"]
        into, out = ((hidden, 2 * inner), (inner, hidden))
        if not family.transposed:
            into, out = into[::-1], out[::-1]
        block = f"{family.block}.experts"
        weights = [
            *weights,
            Weight(f"{family.block}.{family.router}.weight", (count, hidden)),
            Weight(f"{block}.gate_up_proj", (count, *into), "experts"),
            Weight(f"{block}.down_proj", (count, *out), "experts"),
        ]
        if family.expert_bias:
            weights += [
                Weight(f"{family.block}.{family.router}.bias", (count,)),
                Weight(f"{block}.gate_up_proj_bias", (count, 2 * inner), "expert_biases"),
                Weight(f"{block}.down_proj_bias", (count, hidden), "expert_biases"),
            ]
        # each of a token's experts has its own copy of the input, and its output is weighted before the sum
        kept, products = each * (4 * inner + 2 * hidden), each * (2 * inner + hidden)
        if family.shared:
            wide = config["shared_expert_intermediate_size"]
            weights += self._feed_forward(f"{family.block}.shared_expert", wide)
            weights.append(Weight(f"{family.block}.shared_expert_gate.weight", (1, hidden), "linear"))
            kept, products = kept + 4 * wide, products + 2 * wide
        return Layer(tuple(weights), kept, products, active=each / count, window=window)


def _gpt2(config: Mapping[str, Any]) -> ModelShape:
    hidden, vocab, heads = config["n_embd"], config["vocab_size"], config["n_head"]
    inner = config.get("n_inner") or 4 * hidden
    weights: list[Weight] = []
    for name, rows, columns in (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, inner),
        ("mlp.c_proj", inner, hidden),
    ):
        weights += [Weight(f"{name}.weight", (rows, columns), "linear"), Weight(f"{name}.bias", (columns,))]
    weights += [
        Weight(f"{norm}.{part}", (hidden,)) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")
    ]
    tied = bool(config.get("tie_word_embeddings", True))
    outside = [
        Weight("transformer.wte.weight", (vocab, hidden), "embedding"),
        Weight("transformer.wpe.weight", (config["n_positions"], hidden), "embedding"),
        Weight("transformer.ln_f.weight", (hidden,)),
        Weight("transformer.ln_f.bias", (hidden,)),
    ]
    return ModelShape(
        family="gpt2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_seq_len=config["n_positions"],
        tie_embeddings=tied,
        prefix="transformer.h.",
        layers=(Layer(tuple(weights), 2 * inner, inner),) * config["n_layer"],
        outside=tuple(outside if tied else [*outside, Weight("lm_head.weight", (vocab, hidden), "linear")]),
    )
