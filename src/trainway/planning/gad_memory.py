"""Bytes that adversarial distillation takes on a rank: student, discriminator, reference, and the answers' caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trainway.config.schema import RunConfig
from trainway.planning.adapters import count_adapters
from trainway.planning.arithmetic import MemoryEstimate
from trainway.planning.gad import stage_names
from trainway.planning.shapes import ModelShape

FP32 = 4


def gad_memory(
    config: RunConfig,
    shape: ModelShape,
    shards: int,
    half_precision: bool,
    estimate: Callable[[ModelShape, int], MemoryEstimate],
) -> MemoryEstimate:
    """Of a run of recipe gad: both models' states at once, and the greatest of what the phases hold in turn.

    `estimate`: of one model that takes so many tokens at once. A micro-batch is gad.tokens_per_gpu tokens, the
    discriminator has the student's body and no logits, and the reference is the student's trained weights in fp32,
    spread as they are; one model learns at a time, and gradients are dropped after its step. While the student answers in the training's own processes, its weights are whole on each rank,
    and rollout.batch_size answers have their keys and values there.
    """
    student = estimate(shape, config.gad.tokens_per_gpu)
    models = [student]
    if config.gad.stage != "seqkd":
        models.append(replace(estimate(without_head(shape), config.gad.tokens_per_gpu), logits=0))
    # of the model that does not learn at the moment, the states alone; buffers of gradients are kept, and so are their views
    names = ["weights", "optimizer", "host"] + ["gradients", "communication"] * (student.communication > 0)
    idle = {name: sum(getattr(model, name) for model in models) for name in names}
    if "adversarial" in stage_names(config.gad) and config.gad.kl_coef:
        idle["weights"] += FP32 * _trained(config, shape) // shards
    learning = replace(max(models, key=_computing), **idle)
    nothing = MemoryEstimate(weights=0, gradients=0, optimizer=0, activations=0, logits=0)
    answering = replace(
        nothing, **idle, answers=_answering(config, shape, shards, 2 if half_precision else FP32)
    )  # fmt: skip
    return max(learning, answering, key=lambda phase: phase.total)


def _computing(model: MemoryEstimate) -> int:
    return model.gradients + model.activations + model.logits + model.gathered + model.communication


def without_head(shape: ModelShape) -> ModelShape:
    """The shape of the same model without its output head."""
    outside = tuple(weight for weight in shape.outside if not weight.name.startswith("lm_head."))
    return replace(shape, outside=outside)


def _trained(config: RunConfig, shape: ModelShape) -> int:
    if config.lora.enabled:
        return count_adapters(shape, config.lora).trainable
    return shape.size


def _answering(config: RunConfig, shape: ModelShape, shards: int, size: int) -> int:
    """Whole weights, beside this rank's own, and the caches; 0 where a server answers."""
    rollout, data = config.rollout, config.data
    if rollout.engine == "vllm":
        return 0
    total = shape.size
    whole = size * (total - total // shards)
    length = data.max_prompt_tokens + data.max_response_tokens
    cache = 2 * shape.num_kv_heads * shape.head_dim * size * sum(
        min(length, layer.window or length) for layer in shape.layers
    )  # fmt: skip
    return whole + rollout.batch_size * cache
