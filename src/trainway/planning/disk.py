"""How much disk a run needs: its checkpoints as they are kept, and the files of the model that it starts from (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainway.config.schema import RunConfig
from trainway.planning.facts import Model
from trainway.planning.gad import stage_names
from trainway.planning.geometry import Geometry

FP32, HALF = 4, 2
MXFP4 = 0.66
"""Bytes of a parameter of gpt-oss as it is published: 4 bits for the experts, bf16 for the rest."""


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk when it is fullest."""

    each_checkpoint: int
    copies: int
    """Checkpoints at once: the newest, the best, one that is being written, and one that is the reference of gad."""
    model: int
    """The downloaded model, and its converted copy where the family needs one; 0 for a local directory or a new model."""

    @property
    def checkpoints(self) -> int:
        return self.each_checkpoint * self.copies

    @property
    def total(self) -> int:
        return self.checkpoints + self.model


def plan_disk(config: RunConfig, model: Model, geometry: Geometry) -> Disk:
    """The disk that the run's settings need. Checkpoints hold fp32 weights and the optimiser's state, of adapters only
    where adapters are trained."""
    each = _state_bytes(config, model)
    pinned = 0
    if config.recipe == "gad" and config.gad.stage != "seqkd":
        each += _state_bytes(config, model, without_head=True)
        pinned = int(config.gad.stage == "all" and bool(config.gad.kl_coef))
    return Disk(
        each, min(_kept(config) + pinned, num_saves(config, geometry) or 1 << 30), _model_bytes(config, model)
    )


def num_saves(config: RunConfig, geometry: Geometry) -> int | None:
    """Checkpoints that a run saves; None while its length is not known."""
    if geometry.total_steps is None:
        return None
    saves = -(-geometry.total_steps // config.checkpoint.save_every)
    if config.recipe == "gad":
        saves += len(stage_names(config.gad)) - 1
    if config.checkpoint.save_each_epoch and geometry.steps_per_epoch:
        saves += geometry.total_steps // geometry.steps_per_epoch
    return saves


def _kept(config: RunConfig) -> int:
    best, written = 1, 1
    return config.checkpoint.keep_last + best + written


def _state_bytes(config: RunConfig, model: Model, *, without_head: bool = False) -> int:
    if config.lora.enabled:
        return 3 * FP32 * model.trained
    head = model.counts.embedding * (not model.shape.tie_embeddings) * without_head
    moments = 2 * (model.total - head) - model.matrices * (config.optim.name == "muon")
    return FP32 * (model.total - head + moments)


def _model_bytes(config: RunConfig, model: Model) -> int:
    path = config.model.path
    if path is None or Path(path).expanduser().exists():
        return 0
    files = round(MXFP4 * model.total) if model.shape.family == "gpt_oss" else HALF * model.total
    return files + HALF * model.total * model.is_mixture
