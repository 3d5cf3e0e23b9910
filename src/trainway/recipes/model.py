"""The model of a run, on the meta device: new or given, whole or with adapters, and the weights that it begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trainway.config.schema import RunConfig
from trainway.data.turns import Progress
from trainway.engines.precision import Precision, choose_precision
from trainway.models.attention_choice import use_attention
from trainway.models.base import BaseModel, BaseWeights, build_base, find_base
from trainway.models.blocks import blocks
from trainway.models.census import Census, flops_per_token, model_census
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.discriminator import (
    DiscriminatorWeights,
    adapt_discriminator,
    build_discriminator,
    use_discriminator_attention,
)
from trainway.models.fused import fuse_blocks
from trainway.models.load import InitialWeights, NewWeights, build_model
from trainway.models.lora import AdaptedWeights, inject_lora
from trainway.models.qlora import LoadedWeights, load_quantized
from trainway.planning.arithmetic import padded_vocab_size
from trainway.planning.geometry import planned_shape
from trainway.planning.shapes import ModelShape, read_shape
from trainway.training.session import Session

_FROZEN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What frozen weights are held in: the type that they are used in."""


@dataclass(frozen=True)
class RunModel:
    """A model whose parameters are on the meta device, and what is known of it before it has any."""

    model: PreTrainedModel
    weights: InitialWeights
    census: Census
    flops_per_token: float
    precision: Precision
    notes: tuple[str, ...]
    """What a person should know before the first step."""


def find_run_base(config: RunConfig, progress: Progress | None = None) -> BaseModel | None:
    """The model that the run starts from, on this machine; None when it makes a new one.

    Raises ConfigError, DataError or EnvironmentFault, with the list of what is missing.
    """
    if config.model.path is None:
        return None
    return find_base(
        config.model.path,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        cache=Path(config.data.store_dir),
        needs_tokenizer=config.tokenizer.path is None,
        **({"report": progress} if progress else {}),
    )


def build_run_model(session: Session) -> RunModel:
    """The model as the engines take it: adapters, attention, checkpointing and compilation in place.

    Raises ConfigError for settings that do not fit the model.
    """
    config, device = session.config, session.world.device
    precision = choose_precision(config.train.precision, device)
    model, weights, notes = (
        _new(session) if session.base is None else _given(session, session.base, precision)
    )
    return _ready(config, model, weights, precision, notes)


def build_run_discriminator(session: Session, base: BaseModel, pad_id: int) -> RunModel:
    """A discriminator with the body of `base`, as `build_run_model` makes the model that it judges.

    pad_id: the token by whose absence transformers finds where a text ends; see `scoring_tokenizer`.
    Raises ConfigError for settings that do not fit the model.
    """
    config, device = session.config, session.world.device
    precision = choose_precision(config.train.precision, device)
    dtype = _FROZEN[precision] if config.lora.enabled else torch.float32
    model = build_discriminator(base, dtype=dtype, device=device, pad_id=pad_id)
    use_discriminator_attention(
        model, base, config.model.attention, packed=config.data.packing != "none", device=device
    )
    fuse_blocks(model)
    weights: InitialWeights = DiscriminatorWeights.of(BaseWeights(base), model, config.seed)
    if config.lora.enabled:
        note = str(adapt_discriminator(model, config.lora, base.source, base.revision))
        weights = AdaptedWeights(weights, config.seed)
    else:
        note = f"all {sum(p.numel() for p in model.parameters()):,} parameters are trained"
    return _ready(config, model, weights, precision, (note,))


def run_shape(session: Session) -> ModelShape | None:
    """The model's shape for the plan's arithmetic; None for a family that it does not know."""
    if session.base is None:
        return planned_shape(session.config, _vocab_size(session))
    return read_shape(session.base.config.to_dict())


def _ready(
    config: RunConfig,
    model: PreTrainedModel,
    weights: InitialWeights,
    precision: Precision,
    notes: tuple[str, ...],
) -> RunModel:
    """The model with checkpointing and compilation in place, counted."""
    model.train()
    if config.train.activation_checkpointing != "none":
        checkpoint_activations(blocks(model), config.train.activation_checkpointing)
    if config.train.compile:
        for block in blocks(model):
            block.compile()
    census = model_census(model)
    return RunModel(
        model, weights, census, flops_per_token(census, model.config, config.train.seq_len), precision, notes
    )


def _new(session: Session) -> tuple[PreTrainedModel, InitialWeights, tuple[str, ...]]:
    config, tokenizer = session.config, session.tokenizer
    model = build_model(
        config.model,
        _vocab_size(session),
        seed=config.seed,
        device="meta",  # the engine knows which of the weights this rank holds
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    name = config.model.architecture
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, NewWeights(config.model, config.seed), (f"{name}: {parameters:,} parameters",)


def _given(
    session: Session, base: BaseModel, precision: Precision
) -> tuple[PreTrainedModel, InitialWeights, tuple[str, ...]]:
    config, device = session.config, session.world.device
    weights: InitialWeights = BaseWeights(base)
    if config.lora.quantize == "4bit":
        model, weights = load_quantized(base, device=device), LoadedWeights()
    else:
        # what is trained is kept in fp32, what is frozen in the type that the arithmetic wants
        dtype = _FROZEN[precision] if config.lora.enabled else torch.float32
        model = build_base(base, dtype=dtype, device=device)
    model.config.pad_token_id = session.tokenizer.pad_token_id
    attention = use_attention(
        model, config.model.attention, packed=config.data.packing != "none", device=device
    )
    fuse_blocks(model)
    kind = type(model).__name__
    notes = [*base.notes, f"{base.source}: {kind}, {attention} attention"]
    if config.lora.enabled:
        notes.append(str(inject_lora(model, config.lora, base.source, base.revision)))
        weights = AdaptedWeights(weights, config.seed)
    else:
        notes.append(f"all {sum(p.numel() for p in model.parameters()):,} parameters are trained")
    return model, weights, tuple(notes)


def _vocab_size(session: Session) -> int:
    return session.config.model.vocab_size or padded_vocab_size(len(session.tokenizer))
