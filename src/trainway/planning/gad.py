"""The stages of adversarial distillation: which there are, how many steps each takes, and which a step belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainway.config.schema import GadConfig, RunConfig

StageName = Literal["seqkd", "warmup", "adversarial"]


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of a run that train the same way; its own steps are counted from 1."""

    name: StageName
    before: int
    """Steps of the run before this stage."""
    steps: int
    epochs: float | None
    """Passes over the prompts; None while their number is not known."""

    @property
    def last(self) -> int:
        return self.before + self.steps

    def own_step(self, step: int) -> int:
        """The step of the stage that `step` of the run is."""
        return step - self.before


def gad_stages(config: RunConfig, rows_per_epoch: int | None = None) -> tuple[Stage, ...] | None:
    """The stages of a run of recipe gad, in order; None while the number of rows is not known and epochs decide.

    A stage of E epochs takes E x rows / train.global_batch_size steps, to the nearest whole one, at least 1.
    """
    stages: list[Stage] = []
    for name in stage_names(config.gad):
        steps, epochs = stage_length(config.gad, name)
        prompts = config.train.global_batch_size
        assert prompts is not None, "the configuration demands it"
        if rows_per_epoch is None and steps is None:
            return None
        if steps is None:
            assert rows_per_epoch is not None
            steps = max(1, round(epochs * rows_per_epoch / prompts))
        passes = None if rows_per_epoch is None else steps * prompts / rows_per_epoch
        stages.append(Stage(name, stages[-1].last if stages else 0, steps, passes))
    return tuple(stages)


def stage_names(gad: GadConfig) -> tuple[StageName, ...]:
    """What gad.stage stands for."""
    return ("warmup", "adversarial") if gad.stage == "all" else (gad.stage,)


def stage_length(gad: GadConfig, name: StageName) -> tuple[int | None, float]:
    """The steps that are set for a stage, if they are, and else its epochs."""
    match name:
        case "seqkd":
            return gad.seqkd_steps, gad.seqkd_epochs
        case "warmup":
            return gad.warmup_steps, gad.warmup_epochs
        case "adversarial":
            return gad.adversarial_steps, gad.adversarial_epochs


def stage_of(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that `step`, counted from 1, belongs to."""
    return next(stage for stage in stages if step <= stage.last)


def stage_seed(seed: int, stage: Stage) -> int:
    """What orders a stage's rows and draws its answers: so a stage is the same in a run of its own as behind another."""
    return seed if stage.name != "adversarial" else seed ^ 0x5EED_AD5E


def describe_stages(stages: tuple[Stage, ...]) -> str:
    """`warmup 2,204 steps (2.00 epochs) + adversarial 4,408 steps (4.00 epochs) = 6,612 steps`."""
    parts = [
        f"{stage.name} {stage.steps:,} steps" + (f" ({stage.epochs:.2f} epochs)" if stage.epochs else "")
        for stage in stages
    ]
    return parts[0] if len(parts) == 1 else f"{' + '.join(parts)} = {stages[-1].last:,} steps"
