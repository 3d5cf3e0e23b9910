"""The loop of adversarial distillation, stage after stage, readable top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainway.checkpoint.state import TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.config.schema import RunConfig
from trainway.data.teacher_rows import TeacherRow, TeacherSource
from trainway.engines.base import Learner
from trainway.errors import Stopped
from trainway.gad.guards import GadGuard
from trainway.gad.losses import group_advantages
from trainway.gad.measures import step_measures
from trainway.gad.phases import (
    Optimize,
    Players,
    Reference,
    Update,
    all_exchanges,
    compare,
    imitate,
    reinforce,
    score,
    step_seeds,
    teacher_exchanges,
    train_discriminator,
    write_answers,
)
from trainway.logs import stage as log_stage
from trainway.planning.gad import Stage, stage_of, stage_seed
from trainway.rollout.base import Rollout, Sampling
from trainway.schedules import lr_factor
from trainway.tracking import Trackers
from trainway.training.guard import StepGuard
from trainway.training.progress import Progress
from trainway.training.randomness import seed_step
from trainway.training.saving import Saver
from trainway.training.shutdown import StopSignal
from trainway.training.speed import SpeedMeter

Validate = Callable[[int, Stage], dict[str, float]]
"""Answer the validation prompts after a step, log what is measured, and return it."""


@dataclass(frozen=True)
class Work:
    """What the loop works with: all of it made by the recipe."""

    config: RunConfig
    stages: tuple[Stage, ...]
    players: Players
    sampling: Sampling
    loaders: Mapping[str, TeacherSource]
    """By stage: each begins its epochs anew, as a run of its own would."""
    meter: SpeedMeter
    trackers: Trackers
    stop: StopSignal
    validate: Validate
    saver: Saver
    checkpoints: CheckpointStore
    check_first_step: Callable[[Learner], None]
    """Look at what a model's first step has left, before it costs more."""


class _Judges:
    """Which steps are not taken, for each model, and what looks wrong in a run."""

    def __init__(self, config: RunConfig, state: Mapping[str, Any], *, is_main: bool) -> None:
        self.models = {name: StepGuard(config.train) for name in ("student", "discriminator")}
        self.watch = GadGuard(speaks=is_main)
        if state:
            for name, guard in self.models.items():
                guard.load(state[name])
            self.watch.load(state["watch"])

    @property
    def skipped(self) -> int:
        return sum(guard.skipped for guard in self.models.values())

    def state(self) -> dict[str, Any]:
        return {**{name: guard.state() for name, guard in self.models.items()}, "watch": self.watch.state()}


def fit(work: Work, state: TrainState) -> TrainState:
    """Train from `state` to the end of the last stage.

    Raises:
        Stopped: a stop was requested; a checkpoint of the last finished step is on the disk.
    """
    config, world, saver, total = work.config, work.players.world, work.saver, work.stages[-1].last
    judges = _Judges(config, state.guard, is_main=world.is_main)
    progress = Progress(total, state.step, config.log.every, is_main=world.is_main)
    saved_step, started, before = state.step, time.monotonic(), state.elapsed_s
    reference: Reference | None = None
    current: Stage | None = None
    work.meter.restart()
    try:
        for step in range(state.step + 1, total + 1):
            world.pulse.enter("agreement", step)
            stopping, written, failed = world.sum(work.stop.requested, *saver.progress())
            saver.advance(written, failed)
            if stopping:
                if saved_step != state.step:
                    _save(work, state)
                saver.finish()
                raise Stopped(state.step)
            if (now := stage_of(work.stages, step)) != current:
                current, reference = now, begin_stage(work, now, state.step)
            seed_step(config.seed, step, world.rank)
            world.pulse.enter("data")
            rows = work.loaders[current.name].step(current.own_step(step))
            figures, tokens = take_step(work, current, step, rows.rows, reference, judges)
            metrics = {
                "samples": rows.sample_hash,
                "gad/stage": current.name,
                **figures,
                **work.meter.step(tokens),
            }
            work.trackers.log(step, metrics)
            judges.watch.look(step, current.name, figures)
            progress.step(step, _shown(current, step, metrics), (total - step) * work.meter.seconds_per_step)
            state = replace(
                state,
                step=step,
                tokens_seen=state.tokens_seen + int(tokens),
                samples_seen=state.samples_seen + len(rows.rows),
                skipped_steps=judges.skipped,
                guard=judges.state(),
                elapsed_s=before + time.monotonic() - started,
            )
            save_due = step % config.checkpoint.save_every == 0 or step == current.last
            if save_due or step % config.eval.every == 0:
                state = _validated(state, work.validate(step, current), saved=save_due)
            if save_due:
                _save(work, state)
                saved_step = step
                gc.collect()
            work.meter.restart()
        saver.finish()
    finally:
        progress.close()
    return state


def begin_stage(work: Work, now: Stage, step: int) -> Reference | None:
    """Make ready for a stage of which steps up to `step` of the run are done; its reference, if it has one.

    At its beginning the optimisers start anew and the student as it is becomes the reference. Later the reference is
    read from the checkpoint of that moment, which is kept for it.
    """
    log_stage("STAGE", f"{now.name}: steps {now.before + 1:,} to {now.last:,}, {now.steps:,} of its own")
    work.meter.forget()
    if now.name != "adversarial":
        return None
    players, begins = work.players, step == now.before
    if begins:
        for learner in (players.student, players.discriminator):
            assert learner is not None
            learner.reset()
    if not work.config.gad.kl_coef:
        return None
    student = players.student
    weights = {
        name: piece.tensor.detach().clone()
        for name, piece in student.pieces.items()
        if piece.tensor.requires_grad
    }
    if not begins:
        # the present weights aside, the old ones in, and both change places
        student.read(work.checkpoints.resolve(now.before), weights_only=True)
        student.exchange(weights)
    return Reference(weights)


def take_step(
    work: Work,
    now: Stage,
    step: int,
    rows: Sequence[TeacherRow],
    reference: Reference | None,
    judges: _Judges,
) -> tuple[dict[str, Any], float]:
    """One step of a stage; its figures, and the tokens that went through a model."""
    players, own = work.players, now.own_step(step)
    factor = lr_factor(work.config.schedule, own, now.steps)

    def optimize(name: str) -> Optimize:
        guard = judges.models[name]

        def take(learner: Learner, loss: float) -> float:
            work.saver.before_update()
            max_norm = work.config.train.max_grad_norm
            norm = learner.step(factor, max_norm, lambda norm: guard.accept(step, loss, norm))
            if own == 1 and not guard.skipped:
                work.check_first_step(learner)
            return norm

        return take

    players.seconds.clear()
    updates: dict[str, Update]
    if now.name == "seqkd":
        teacher = teacher_exchanges(rows)
        tokens, figures = sum(exchange.length for exchange in teacher), dict[str, Any]()
        with players.phase("student"):
            updates = {"student": imitate(players, teacher, optimize("student"))}
    else:
        updates, figures, tokens = _play(work, now, own, rows, reference, optimize)
    for name, update in updates.items():
        figures |= {f"train/{name}_loss": update.loss, f"optim/{name}_norm": update.grad_norm}
    figures["optim/lr"] = _peak_lr(work.config, now) * factor
    return figures, float(tokens)


def _play(
    work: Work,
    now: Stage,
    own: int,
    rows: Sequence[TeacherRow],
    reference: Reference | None,
    optimize: Callable[[str], Optimize],
) -> tuple[dict[str, Update], dict[str, Any], int]:
    """A step in which the student answers: what each model has learnt, the figures, and the tokens of all answers."""
    gad, players = work.config.gad, work.players
    with players.phase("rollout"):
        seeds = step_seeds(players, rows, stage_seed(work.config.seed, now), own)
        written = write_answers(players, rows, seeds, work.sampling)
    answers = all_exchanges(rows, written)
    parts = players.batches(answers)
    with players.phase("score"):
        scores = score(players, parts, len(answers))
    with players.phase("discriminator"):
        pairs = compare(scores, len(rows))
        updates = {"discriminator": train_discriminator(players, parts, pairs, optimize("discriminator"))}
    policy: dict[str, float] = {}
    with players.phase("student"):
        if now.name == "adversarial":
            rewards = scores[: -len(rows)].view(len(rows), -1)  # from before the discriminator's step
            updates["student"], stats = reinforce(
                players, answers[: -len(rows)], group_advantages(rewards).flatten(), reference,
                optimize("student"), num_updates=len(rows) // (gad.prompts_per_update or len(rows)),
            )  # fmt: skip
            policy = {name: value.item() for name, value in stats._asdict().items()}
        elif own > gad.discriminator_only_steps:
            updates["student"] = imitate(players, answers[-len(rows) :], optimize("student"))
    figures = measures(rows, written, scores, policy, players.seconds)
    return updates, dict(figures), sum(exchange.length for exchange in answers)


def measures(
    rows: Sequence[TeacherRow],
    written: Sequence[Sequence[Rollout]],
    scores: torch.Tensor,
    policy: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """The figures of a step's answers; the sums of `policy` are over all their tokens."""
    lengths = np.array([[len(answer.tokens) for answer in answers] for answers in written])
    sums = {name: policy[name] for name in ("kl", "entropy", "clipped") if name in policy}
    found = step_measures(
        scores=scores[: -len(rows)].view(len(rows), -1).numpy(),
        teacher_scores=scores[-len(rows) :].numpy(),
        lengths=lengths,
        teacher_lengths=np.array([len(row.response) for row in rows]),
        truncated=np.array([[answer.truncated for answer in answers] for answers in written]),
        policy_tokens=float(lengths.sum()) if policy else 0.0,
        policy_sums=sums,
        seconds=seconds,
    )
    return found | ({"gad/max_ratio": policy["max_ratio"]} if policy else {})


def _peak_lr(config: RunConfig, now: Stage) -> float:
    return config.gad.seqkd_lr if now.name == "seqkd" else config.optim.lr


def _shown(now: Stage, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the progress line shows: the stage's own step, and the loss of the model that the stage is about."""
    name = "student" if "train/student_loss" in metrics else "discriminator"
    return {
        **metrics,
        "label": f"{now.name} {now.own_step(step):,}/{now.steps:,}",
        "train/loss": metrics[f"train/{name}_loss"],
        "optim/grad_norm": metrics[f"optim/{name}_norm"],
    }


def _save(work: Work, state: TrainState) -> None:
    work.trackers.sync()  # a run that goes on from this step needs the records up to it
    work.saver.save(state)


def _validated(state: TrainState, found: Mapping[str, float], *, saved: bool) -> TrainState:
    """The state with what validation says of it; the best checkpoint is the one whose answers are nearest the teacher's."""
    distance = 1.0 - found["val/rouge_l"]
    if saved and (state.best_val_loss is None or distance < state.best_val_loss):
        state = replace(state, best_val_loss=distance, best_step=state.step)
    return replace(state, last_val_loss=found["val/loss"])
