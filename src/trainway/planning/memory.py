"""The bytes that a training step takes on one rank: what is held in each of its phases, and the phase that holds most (no torch).

A step has five phases: the loss at the end of a forward pass, the loss's own backward pass, the blocks' backward pass,
what is left when it reaches the embedding, and the optimiser's step, for which Muon takes room of its own. What autograd keeps is
counted in `activations`; `docs/memory.md` says how it was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trainway.config.schema import LoraConfig, ModelConfig, RunConfig
from trainway.planning.activations import Kept, Step
from trainway.planning.adapters import count_adapters
from trainway.planning.arithmetic import FP32, MemoryEstimate, as_shape
from trainway.planning.shapes import ModelShape

EngineName = Literal["single", "ddp", "fsdp", "zero2", "zero3"]
SHARDED = ("fsdp", "zero2", "zero3")

CPU_CHUNK_LOGITS = 2**22
"""As `losses.CPU_CHUNK_LOGITS`."""
MUON_TOGETHER = 2**25
"""As `muon.TOGETHER`."""
BUCKET = 50_000_000
"""Elements of a buffer in which DeepSpeed collects gradients; as `engines.ds_config.BUCKET`."""


def memory_bytes(
    model: ModelConfig | ModelShape,
    vocab_size: int | None = None,
    *,
    micro_batch_size: int,
    seq_len: int,
    loss_chunk_tokens: int,
    accumulates: bool = True,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpointing: Literal["none", "selective", "full"] = "none",
    half_precision: bool = False,
    on_cpu: bool = False,
    shards: int | None = None,
    engine: EngineName = "single",
    cpu_offload: Literal["none", "optimizer", "all"] = "none",
    lora: LoraConfig | None = None,
    eager_attention: bool = False,
    documents: bool = True,
) -> MemoryEstimate:
    """Bytes of one rank at the highest point of a step: fp32 weights, and `half_precision` for autocast to bf16 or fp16.

    `accumulates`: a step has several micro-batches. `shards`: ranks over which fsdp, zero2 or zero3 cuts the states. An
    enabled `lora` freezes the model, which then is held in the type of the arithmetic. DeepSpeed holds weights in that
    type too, and an fp32 copy beside the moments. `eager_attention` keeps the scores of all pairs of tokens of a row;
    `documents`: rows may hold several. What is no tensor comes on top: on a GPU the CUDA context and the allocator's
    slack, about 1 GiB; on a CPU the libraries, about 0.4 GiB.
    """
    shape = as_shape(model, vocab_size)
    tuned = lora if lora is not None and lora.enabled else None
    tokens = micro_batch_size * seq_len
    step = Step(
        tokens, seq_len, loss_chunk_tokens, accumulates, checkpointing, half_precision, on_cpu, eager_attention, documents
    )  # fmt: skip
    states = States.of(shape, optimizer, tuned, step, engine, shards or 1)
    peak = max(_phases(shape, step, states, tuned, engine), key=lambda phase: phase.total)
    return states.offloaded(peak, engine, "none" if on_cpu else cpu_offload)


def staging_bytes(config: RunConfig, shape: ModelShape, shards: int) -> int:
    """The copy of this rank's trained weights and optimiser state that an asynchronous save writes from."""
    adapted = config.lora.enabled
    trained = count_adapters(shape, config.lora).trainable if adapted else shape.size
    models = 2 if config.recipe == "gad" and config.gad.stage != "seqkd" else 1
    moments = 2 * trained * FP32
    if config.optim.name == "muon" and not adapted:
        moments -= sum(layer.matrices for layer in shape.layers) * FP32
    return models * (trained * FP32 + moments) // shards


@dataclass(frozen=True)
class States:
    """Bytes on this rank of what outlives a micro-batch, and of what sharing it takes while computing."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Of the blocks' weights in the type of the arithmetic, which autocast keeps for a micro-batch."""
    gathered: int
    """Of weights and gradients that lie elsewhere, at most at once, in the backward pass."""
    gathered_forward: int
    """Of weights that lie elsewhere, when the forward pass is over."""
    buffers: int
    """In which gradients travel."""
    step: int
    """What the optimiser's step takes for itself."""

    @classmethod
    def of(
        cls, shape: ModelShape, optimizer: str, lora: LoraConfig | None, step: Step, engine: str, shards: int
    ) -> States:
        total = shape.size
        matrices = [layer.matrices for layer in shape.layers]
        trainable, weights = total, total * FP32
        deepspeed = engine in ("zero2", "zero3")
        if lora is not None:
            adapted = count_adapters(shape, lora)
            trainable = adapted.trainable
            frozen = (total - adapted.quantized) * step.size
            frozen += -(-adapted.quantized * 33 // 64)  # 4 bits, and a byte of scale for 64 of them
            weights = frozen + trainable * (step.size if deepspeed else FP32)
        elif deepspeed:
            weights = total * step.size
        moments = 2 * trainable * FP32
        if optimizer == "muon" and lora is None:
            moments -= sum(matrices) * FP32  # one momentum, no second moment
        if deepspeed:
            moments += trainable * FP32
        casts = step.half and lora is None and engine in ("single", "ddp")
        return cls(
            weights=weights if engine not in ("fsdp", "zero3") else weights // shards,
            gradients=trainable * FP32 // (shards if engine in SHARDED else 1),
            optimizer=moments // (shards if engine in SHARDED else 1),
            copies=2 * sum(matrices) if casts else 0,
            gathered=_gathered(total - sum(matrices), max(matrices), lora is not None, step, engine),
            gathered_forward=_gathered_forward(
                total - sum(matrices), max(matrices), lora is not None, step, engine
            ),
            buffers=_buffers(trainable, step, engine),
            step=_muon_bytes(shape, engine in SHARDED) if optimizer == "muon" and lora is None else 0,
        )

    def offloaded(self, peak: MemoryEstimate, engine: str, offload: str) -> MemoryEstimate:
        """With what the CPU holds moved to its memory."""
        if engine not in SHARDED or offload == "none":
            return peak
        host = self.gradients + self.optimizer
        peak = replace(peak, gradients=0, optimizer=0)
        if engine in ("fsdp", "zero3") and offload == "all":
            host += self.weights
            peak = replace(peak, weights=0)
        return replace(peak, host=host)


def _gathered(outside: int, block: int, frozen: bool, step: Step, engine: str) -> int:
    if engine == "zero2":  # gradients of two blocks before they are reduced
        return 0 if frozen else 2 * block * FP32
    if engine not in ("fsdp", "zero3"):
        return 0
    # what lies outside the blocks stays for the whole pass; of the blocks this one and the next
    if frozen:
        return step.size * outside + 2 * block * step.size
    both = 2 * block * (step.size + FP32)
    return both + outside * (2 * FP32 if engine == "fsdp" else step.size + FP32)


def _gathered_forward(outside: int, block: int, frozen: bool, step: Step, engine: str) -> int:
    if engine == "fsdp":  # blocks are in pieces again, and no gradient is there
        return outside * (step.size if frozen else FP32)
    return _gathered(outside, block, frozen, step, engine)


def _buffers(trainable: int, step: Step, engine: str) -> int:
    match engine:
        case "ddp":
            # gradients are views of its buckets; those of a step's first micro-batches lie beside them
            return trainable * FP32 if step.accumulates else 0
        case "zero2":
            return 2 * min(BUCKET, trainable) * step.size
        case "zero3":
            return min(BUCKET, trainable) * step.size
    return 0


def _muon_bytes(shape: ModelShape, sharded: bool) -> int:
    """What `muon.Muon` holds for the matrices that it orthogonalises at once, as fp32: those, what they are multiplied to, twice
    over, and two squares of the shorter side; where a rank holds rows alone, what it sends and receives too.
    """
    shapes = Counter(
        weight.shape for layer in shape.layers for weight in layer.weights if len(weight.shape) == 2
    )
    most = 0
    for (rows, columns), count in shapes.items():
        together = min(count, max(1, MUON_TOGETHER // (rows * columns)))
        copies, side = (6 if sharded else 3), min(rows, columns)
        most = max(most, together * (copies * rows * columns + 2 * side * side) * FP32)
    return most


def _phases(
    shape: ModelShape, step: Step, states: States, lora: LoraConfig | None, engine: str
) -> Iterator[MemoryEstimate]:
    tokens = step.tokens
    kept = Kept.of(shape, step, lora)
    head = 0 if lora is not None else shape.vocab_size * shape.hidden_size * FP32
    hidden = tokens * shape.hidden_size * FP32
    there = (
        step.accumulates or engine == "ddp"
    )  # gradients, before this backward pass has made any; DDP keeps its buckets
    base = MemoryEstimate(
        weights=states.weights,
        gradients=states.gradients if there else 0,
        optimizer=states.optimizer,
        activations=tokens * kept.held + states.copies,
        logits=0,
        gathered=states.gathered_forward,
        communication=states.buffers,
    )
    yield replace(
        base, activations=base.activations + tokens * kept.last, logits=_loss_bytes(shape, step, head)
    )
    # the gradients that the forward pass has made, multiplied by what comes from above
    yield replace(base, logits=2 * (hidden + head))
    base = replace(base, gathered=states.gathered)
    # a head that is tied to the embedding hands its gradient over when that has its own; fsdp's lies with what is gathered
    apart = engine != "fsdp" or lora is not None
    waiting = head if shape.tie_embeddings and apart else 0
    yield replace(base, logits=waiting, activations=tokens * (kept.all + kept.pulled) + states.copies)
    embedding = head * ((apart and there) + shape.tie_embeddings)
    yield replace(
        base, gradients=states.gradients, logits=embedding, activations=tokens * kept.first + states.copies
    )
    yield replace(
        base, gradients=states.gradients, optimizer=states.optimizer + states.step, activations=0, gathered=0
    )


def _loss_bytes(shape: ModelShape, step: Step, head: int) -> int:
    """What `losses.linear_cross_entropy` holds while it computes the last chunk of logits."""
    vocab, hidden, tokens = shape.vocab_size, shape.hidden_size, step.tokens
    chunk = min(tokens, step.chunk_tokens)
    if step.on_cpu:
        chunk = min(chunk, max(1, CPU_CHUNK_LOGITS // vocab))
    held = tokens * hidden * step.size + head  # gradients of hidden states and head
    if step.on_cpu:
        held += tokens * hidden * FP32  # the rows that have a target, picked out
    if step.half:
        held += tokens * hidden * 2  # the hidden states
        held += 2 * head // FP32 * 2  # the head, and a chunk's gradient of it
    # a CPU turns fp32 logits into probabilities where they lie; else they are there as the product gave them, as fp32
    # log-probabilities and, in half precision, as what the product takes
    return held + chunk * vocab * (FP32 if step.on_cpu and not step.half else 2 * FP32)
