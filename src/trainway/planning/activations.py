"""What autograd keeps of a token while a training step goes forward and back, counted as the models' code saves it (no torch)."""

from __future__ import annotations

from typing import NamedTuple

from trainway.config.schema import LoraConfig
from trainway.planning.adapters import adapted_ranks
from trainway.planning.arithmetic import FP32
from trainway.planning.shapes import Layer, ModelShape, Weight

FUSED: dict[str, frozenset[str]] = {
    "gpt_oss": frozenset({"RMSNorm"}),
    "phi3": frozenset({"RMSNorm"}),
    "mixtral": frozenset({"RMSNorm", "Attention"}),
    "olmo2": frozenset({"RMSNorm", "MLP"}),
    "smollm3": frozenset({"RMSNorm", "MLP"}),
    **dict.fromkeys(
        ("granite", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
        frozenset({"RMSNorm", "MLP", "Attention"}),
    ),
}
"""What `models.fused` replaces in fp32 on a CPU, by family: such a norm keeps its input and not the normalised one, such a
feed-forward layer not what its activation gave."""


class Step(NamedTuple):
    """How one rank computes a step."""

    tokens: int
    """Of a micro-batch."""
    seq_len: int
    chunk_tokens: int
    accumulates: bool
    """A step has more than one micro-batch: gradients are there while the next one is computed."""
    checkpointing: str
    half: bool
    on_cpu: bool
    eager: bool
    documents: bool
    """Rows hold several documents, which attention on a CPU computes apart."""

    @property
    def size(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.half else FP32


class Kept(NamedTuple):
    """Bytes of one token that autograd keeps, or that are there for a moment."""

    all: int
    """At the moment when the last block is about to go back, with what checkpointing has made again."""
    held: int
    """Of that, what is there from the forward pass."""
    last: int
    """The last norm's output, which the loss reads."""
    pulled: int
    """Gradients within one block."""
    first: int
    """Of the first block: what is left of all when its backward pass ends."""

    @classmethod
    def of(cls, shape: ModelShape, step: Step, lora: LoraConfig | None) -> Kept:
        stream = step.size if lora is not None else FP32
        blocks = [_block(shape, layer, step, lora, place) for place, layer in enumerate(shape.layers)]
        last = _norm(shape, step, lora, _fuses(shape, step, "RMSNorm"))
        angles = 2 * FP32 * shape.head_dim  # cosines and sines, for all blocks
        ids = 3 * 8
        again = 0
        match step.checkpointing:
            case "full":
                held = len(blocks) * stream * shape.hidden_size
                again = max(block.all for block in blocks)
            case "selective":
                held = sum(stream * shape.hidden_size + block.products for block in blocks)
                again = max(0, *(block.all - block.products for block in blocks))
            case _:
                held = sum(block.all for block in blocks)
        return cls(
            all=held + again + last + angles + ids,
            held=held + last + angles + ids,
            last=stream * shape.hidden_size,
            pulled=max(block.pulled for block in blocks) if blocks else 0,
            first=stream * shape.hidden_size + angles + ids,
        )


class _Block(NamedTuple):
    all: int
    products: int
    """What matrix products and attention gave."""
    pulled: int


def _block(shape: ModelShape, layer: Layer, step: Step, lora: LoraConfig | None, place: int) -> _Block:
    heads, kv_heads, width, hidden = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size
    size = step.size
    attended = size * width * (2 * heads + 2 * kv_heads) + FP32 * heads  # q, k, v, out and the logsumexp
    if step.eager:
        attended += heads * step.seq_len * (FP32 + (size if step.half else 0))
    norms = sum(_is_norm(weight, shape) for weight in layer.weights)
    kept = max(norms, 1) * _norm(shape, step, lora, _fuses(shape, step, "RMSNorm")) + attended
    names = {weight.name for weight in layer.weights}
    if "self_attn.q_norm.weight" in names:
        fused = _fuses(shape, step, "RMSNorm")
        kept += (FP32 if fused else FP32 + (size if lora is None else 0)) * width * (heads + kv_heads)
    kept += _inputs(shape, layer, step, lora, place) + size * _feed_forward(shape, layer, step)
    products = attended + size * (2 * hidden + layer.products + _adapter_products(shape, layer, lora, place))
    inner = layer.products // 2 if layer.products else 0
    # the feed-forward layer's two gradients beside that of its product, and two of the residual stream
    pulled = size * 2 * inner + 2 * FP32 * hidden
    return _Block(kept, products, pulled)


def _norm(shape: ModelShape, step: Step, lora: LoraConfig | None, fused: bool) -> int:
    """Input of a norm in fp32, and unless fused the normalised one, which only a trained weight needs."""
    return shape.hidden_size * (FP32 if fused or lora is not None else 2 * FP32)


def _feed_forward(shape: ModelShape, layer: Layer, step: Step) -> int:
    """Values that the layer itself keeps, without the input of its last matrix product."""
    if _is_mixture(layer):
        return layer.kept
    inner = layer.products // 2 if layer.kept == 2 * layer.products else layer.products
    own = layer.kept - inner
    return own - inner if _fuses(shape, step, "MLP") and layer.kept == 2 * layer.products else own


def _inputs(shape: ModelShape, layer: Layer, step: Step, lora: LoraConfig | None, place: int) -> int:
    """Bytes of what matrix products read, kept for the gradients of their weights or adapters."""
    ranks = adapted_ranks(shape, lora, place) if lora is not None else {}
    seen: set[str] = set()
    total = 0
    for weight in layer.weights:
        module = weight.name.removesuffix(".weight")
        if weight.kind != "linear" or (lora is not None and module not in ranks):
            continue
        source = _source(module)
        total += step.size * ranks.get(module, 0)
        if step.half and (lora is not None or source.endswith("norm")):
            total += step.size * _width(shape, weight)  # autocast, and peft, make a copy for each
        elif source not in seen:
            seen.add(source)
            total += step.size * _width(shape, weight) * (source != "attention" or _joins(step))
    return total


def _adapter_products(shape: ModelShape, layer: Layer, lora: LoraConfig | None, place: int) -> int:
    """Numbers of one token that the two products of each adapter give."""
    ranks = adapted_ranks(shape, lora, place) if lora is not None else {}
    return sum(
        ranks[module] + weight.size // _width(shape, weight)
        for weight in layer.weights
        if weight.kind == "linear" and (module := weight.name.removesuffix(".weight")) in ranks
    )


def _source(module: str) -> str:
    """What a matrix product reads."""
    name, attends = module.rpartition(".")[2], "attn" in module
    if name in ("o_proj", "c_proj") and attends:
        return "attention"
    if name in ("down_proj", "c_proj"):
        return "product"
    return "attention norm" if attends else "feed-forward norm"


def _joins(step: Step) -> bool:
    """Attention keeps its output once; on a CPU what each document has given is joined to another."""
    return step.on_cpu and step.documents


def _width(shape: ModelShape, weight: Weight) -> int:
    return weight.shape[0] if shape.family == "gpt2" else weight.shape[1]  # its matrices are [in, out]


def _is_mixture(layer: Layer) -> bool:
    return any(weight.kind == "experts" for weight in layer.weights)


def _fuses(shape: ModelShape, step: Step, part: str) -> bool:
    return step.on_cpu and not step.half and part in FUSED.get(shape.family, ())


def _is_norm(weight: Weight, shape: ModelShape) -> bool:
    owner, _, part = weight.name.rpartition(".")
    return part == "weight" and weight.shape == (shape.hidden_size,) and "self_attn." not in owner
