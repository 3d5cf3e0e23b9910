"""The supervised loop, readable top to bottom: pretraining and fine-tuning run through it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from trainway.checkpoint.state import TrainState
from trainway.config.schema import RunConfig
from trainway.data.loader import StepBatch, StepSource
from trainway.engines.base import Learner
from trainway.engines.world import World
from trainway.errors import Stopped
from trainway.logs import logger, stage
from trainway.planning.geometry import Geometry
from trainway.schedules import lr_factor
from trainway.tracking import Trackers
from trainway.training.guard import StepGuard
from trainway.training.progress import Progress
from trainway.training.randomness import seed_step
from trainway.training.saving import Saver
from trainway.training.shutdown import StopSignal
from trainway.training.speed import SpeedMeter


@dataclass(frozen=True)
class Work:
    """What the loop works with: all of it made by a recipe."""

    config: RunConfig
    geometry: Geometry
    total_steps: int
    world: World
    learner: Learner
    loader: StepSource
    meter: SpeedMeter
    trackers: Trackers
    stop: StopSignal
    evaluate: Callable[[int], float]
    """Validate after this step, log, and return the validation loss."""
    saver: Saver
    check_first_step: Callable[[], None]
    """Look at what the run's first step has left, before it costs more."""


def fit(work: Work, state: TrainState) -> TrainState:
    """Train from `state` to the last step.

    Raises:
        Stopped: a stop was requested; a checkpoint of the last finished step is on the disk.
    """
    config, world, saver, total = work.config, work.world, work.saver, work.total_steps
    guard = StepGuard(config.train)
    if state.guard:
        guard.load(state.guard)
    progress = Progress(total, state.step, config.log.every, is_main=world.is_main)
    saved_step, started, before = state.step, time.monotonic(), state.elapsed_s
    batches = work.loader.steps(state.step + 1, total + 1, config.data.prefetch_steps)
    work.meter.restart()
    pulse = world.pulse
    pulse.enter("data", state.step + 1)
    with _collector_out_of_the_way():
        try:
            for batch in batches:
                # One collective tells every rank the divisor of the loss, whether any rank must stop, and how far a
                # save under way is.
                pulse.enter("agreement")
                targets, tokens, stopping, written, failed = world.sum(
                    batch.num_targets, batch.num_tokens, work.stop.requested, *saver.progress()
                )
                saver.advance(written, failed)
                if stopping:
                    if saved_step != state.step:
                        _save(work, state)
                    saver.finish()
                    raise Stopped(state.step)

                step = batch.step
                seed_step(config.seed, step, world.rank)
                pulse.enter("forward and backward")
                loss, *z_loss = _accumulate(work, batch, targets)
                factor = lr_factor(config.schedule, step, total)
                accept = _judge(guard, step, loss)
                pulse.enter("optimizer step")
                saver.before_update()
                norm = work.learner.step(factor, config.train.max_grad_norm, accept)
                if step == 1 and not guard.skipped:
                    work.check_first_step()

                metrics = {
                    "samples": batch.sample_hash,
                    "train/loss": loss,
                    **({"train/z_loss": z_loss[0]} if z_loss else {}),
                    "optim/grad_norm": norm,
                    "optim/lr": config.optim.lr * factor,
                    "train/tokens": state.tokens_seen + int(targets),
                    **work.meter.step(tokens),
                }
                work.trackers.log(step, metrics)
                progress.step(step, metrics, (total - step) * work.meter.seconds_per_step)
                state = replace(
                    state,
                    step=step,
                    tokens_seen=state.tokens_seen + int(targets),
                    samples_seen=state.samples_seen + work.geometry.global_batch_size,
                    skipped_steps=guard.skipped,
                    guard=guard.state(),
                    scaler=work.learner.state(),
                    elapsed_s=before + time.monotonic() - started,
                )
                save_due = _save_due(work, step)
                if save_due or step % config.eval.every == 0:
                    state = _with_validation(state, work.evaluate(step), saved=save_due)
                    work.meter.restart()
                if save_due:
                    _save(work, state)
                    saved_step = step
                    gc.collect()
                    work.meter.restart()
                if work.geometry.steps_per_epoch and step % work.geometry.steps_per_epoch == 0:
                    stage("EPOCH", f"epoch {step // work.geometry.steps_per_epoch} ended at step {step}")
                pulse.enter("data", step + 1)
            saver.finish()
        finally:
            batches.close()
            progress.close()
    return state


def _accumulate(work: Work, batch: StepBatch, targets: float) -> list[float]:
    """Forward and backward of the step's micro-batches; the global loss per target token, then the z-loss if on."""
    last = len(batch.micro_batches) - 1
    total = None
    for i, micro in enumerate(batch.micro_batches):
        _log_batch(work.config, batch, i)
        micro = micro.to(work.world.device)
        with work.learner.micro_step(sync=i == last):
            losses = work.learner.module(
                micro.input_ids, micro.labels, micro.position_ids, micro.boundaries, micro.targets
            )
            work.learner.backward(losses.sum(), scale=1 / targets)
        total = losses.detach() if total is None else total + losses.detach()
    assert total is not None
    sums = work.world.sum(*total.flatten().tolist())  # device→host sync
    return [value / targets for value in sums]


def _save(work: Work, state: TrainState) -> None:
    work.trackers.sync()  # a run that goes on from this step needs the records up to it
    work.saver.save(state)


def _judge(guard: StepGuard, step: int, loss: float) -> Callable[[float], bool]:
    return lambda norm: guard.accept(step, loss, norm)


def _with_validation(state: TrainState, loss: float, *, saved: bool) -> TrainState:
    # Only a step whose weights are kept can be the best one.
    if saved and (state.best_val_loss is None or loss < state.best_val_loss):
        state = replace(state, best_val_loss=loss, best_step=state.step)
    return replace(state, last_val_loss=loss)


def _save_due(work: Work, step: int) -> bool:
    config, geometry = work.config.checkpoint, work.geometry
    epoch_ends = geometry.steps_per_epoch is not None and step % geometry.steps_per_epoch == 0
    return (
        step % config.save_every == 0 or step == work.total_steps or (config.save_each_epoch and epoch_ends)
    )


def _log_batch(config: RunConfig, batch: StepBatch, index: int) -> None:
    if config.log.level != "debug" or config.log.batches == "none":
        return
    if config.log.batches == "first-last" and 0 < index < len(batch.micro_batches) - 1:
        return
    micro = batch.micro_batches[index]
    rows, length = micro.input_ids.shape
    segments = rows if micro.boundaries is None else len(micro.boundaries) - 1
    stage("COLLATE", f"{rows} rows of {length} tokens, {segments} segments", level=logging.DEBUG)
    where = f"step {batch.step} micro-batch {index + 1}/{len(batch.micro_batches)}"
    stage("BATCH", f"{where}: {micro.num_targets} targets", level=logging.DEBUG)


@contextmanager
def _collector_out_of_the_way() -> Iterator[None]:
    # The collector walks every object and stalls a step for up to half a second; we run it at saves only.
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.unfreeze()
        logger.debug("garbage collector back on")
