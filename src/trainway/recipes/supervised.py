"""What pretraining and fine-tuning share: a run is opened, its model built, trained, evaluated and finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from trainway.checkpoint.state import TrainState
from trainway.config.schema import RunConfig
from trainway.data.loader import Batch, Loader, validation_batches
from trainway.engines import build_learner, choose_precision, engine_name
from trainway.engines.base import Learner
from trainway.engines.precision import autocast
from trainway.logs import stage
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.lora import check_gradients
from trainway.planning.geometry import plan_memory
from trainway.recipes.measuring import record_run
from trainway.recipes.model import RunModel, build_run_model, run_shape
from trainway.recipes.opening import run_recipe
from trainway.training.evaluate import Prompt, continue_prompts, evaluate_batches
from trainway.training.loop import Work, fit
from trainway.training.saving import STUDENT
from trainway.training.session import (
    RunResult,
    Session,
    finish,
    make_saver,
    open_records,
    recorded_end,
    starting_state,
)
from trainway.training.shutdown import StopSignal
from trainway.training.sources import describe_sources, source_metrics
from trainway.training.speed import MemoryMark, SpeedMeter, peak_flops

Prompts = Callable[[Session], Iterable[Prompt]]
"""Where these recipes differ: what samples continue, the same on every rank."""


def train_supervised(config: RunConfig, prompts: Prompts, **how: Any) -> RunResult:
    """Train, or go on with a run that was stopped or killed; see `run_recipe` for the arguments."""
    return run_recipe(config, lambda session, stop: _train(session, prompts, stop), **how)


@dataclass(frozen=True)
class Opened:
    """A run before its first step."""

    work: Work
    state: TrainState
    """Where it goes on; step 0 for a new one."""
    learner: Learner
    loss_module: CausalLMLoss
    built: RunModel
    mark: MemoryMark
    """The memory of this process before the model."""


def _train(session: Session, prompts: Prompts, stop: StopSignal) -> RunResult:
    config = session.config
    with ExitStack() as stack:
        opened = open_training(session, prompts, stop, stack)
        work, state = opened.work, opened.state
        with recorded_end(session):
            if state.step == 0:
                work.evaluate(0)
            state = fit(work, state)
            if config.eval.after_training and state.best_step not in (None, state.step):
                # the last step's samples are those of the last weights: the best ones answer once more
                opened.learner.read(session.checkpoints.resolve("best"))
                write_samples(session, prompts, opened.learner, opened.loss_module, state.step, best=True)
    record_run(session, opened.built, work.meter, opened.mark)
    return finish(session, state, work.saver.stalled_s, opened.built.census)


def open_training(session: Session, prompts: Prompts, stop: StopSignal, stack: ExitStack) -> Opened:
    """Build the model, load what the run goes on from, and all that the loop works with; `stack` closes it."""
    config, world = session.config, session.world
    mark = MemoryMark.now(world.device)
    built = build_run_model(session)
    loss_module = CausalLMLoss(
        built.model, chunk_tokens=config.train.loss_chunk_tokens, z_loss=config.train.z_loss
    )
    learner = build_learner(config, loss_module, built.model, world, built.weights)
    state = starting_state(session, {STUDENT: learner})
    peak, peak_source = peak_flops(world.device)
    _describe(session, built, f"peak {peak / 1e12:.2f} TFLOP/s per device ({peak_source})")

    trackers = stack.enter_context(open_records(session, state, resumed=state.step > 0))

    def evaluate(step: int) -> float:
        metrics = run_validation(session, loss_module)
        trackers.log(step, {**metrics, **source_metrics(session, step)})
        figures = f"loss {metrics['val/loss']:.4f}  perplexity {metrics['val/ppl']:.2f}"
        stage("EVAL", f"step {step}: {figures}  {metrics['val/bpb']:.4f} bits per byte")
        write_samples(session, prompts, learner, loss_module, step)
        return metrics["val/loss"]

    def check_first_step() -> None:
        if config.lora.enabled:
            check_gradients(built.model, learner.snapshot(), world.sum)

    work = Work(
        config=config,
        geometry=session.geometry,
        total_steps=session.total_steps,
        world=world,
        learner=learner,
        loader=make_loader(session),
        meter=SpeedMeter(built.flops_per_token, peak * world.world_size, world.device, session.pace),
        trackers=trackers,
        stop=stop,
        evaluate=evaluate,
        saver=make_saver(session, {STUDENT: learner}),
        check_first_step=check_first_step,
    )
    return Opened(work, state, learner, loss_module, built, mark)


def run_validation(session: Session, loss_module: CausalLMLoss) -> dict[str, float]:
    """The figures of `evaluate_batches` on eval.max_tokens of the validation split."""
    config, world = session.config, session.world
    precision = choose_precision(config.train.precision, world.device)
    token_bytes = session.store.token_bytes
    return evaluate_batches(loss_module, _validation(session), token_bytes, world, precision)


def write_samples(
    session: Session,
    prompts: Prompts,
    learner: Learner,
    loss_module: CausalLMLoss,
    step: int,
    *,
    best: bool = False,
) -> None:
    """Continue the prompts into samples.jsonl; `best` marks those of the best checkpoint's weights."""
    session.world.pulse.enter("samples", long=True)
    if not (session.world.is_main or learner.is_sharded):
        return
    config, world = session.config, session.world
    samples = continue_prompts(
        loss_module,
        session.tokenizer,
        prompts(session),
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.seed,
    )
    marks = {"best": True} if best else {}
    with autocast(choose_precision(config.train.precision, world.device), world.device):
        lines = [
            json.dumps({"step": step, **marks, **sample}, ensure_ascii=False) + "\n" for sample in samples
        ]
    if world.is_main:
        with session.run.samples.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def make_loader(session: Session) -> Loader:
    """The training batches of this rank."""
    config, geometry, world = session.config, session.geometry, session.world
    return Loader(
        session.store.streams(),
        mix=session.prepared.mix,
        seq_len=config.train.seq_len,
        global_batch_size=geometry.global_batch_size,
        micro_batch_size=geometry.micro_batch_size,
        seed=config.seed,
        packing=config.data.packing,
        shuffle=config.data.shuffle,
        rank=world.rank,
        world_size=world.world_size,
    )


def _validation(session: Session) -> Iterator[Batch]:
    config, world = session.config, session.world
    return validation_batches(
        session.store.split("val"),
        seq_len=config.train.seq_len,
        micro_batch_size=session.geometry.micro_batch_size,
        packing=config.data.packing,
        max_tokens=config.eval.max_tokens,
        rank=world.rank,
        world_size=world.world_size,
    )


def _describe(session: Session, built: RunModel, peak: str) -> None:
    """Say what is about to run, before the first step."""
    config, geometry, world = session.config, session.geometry, session.world
    describe_sources(session)
    for note in built.notes:
        stage("MODEL", note)
    stage("MODEL", f"{built.flops_per_token:,.0f} FLOPs per token, {built.precision}, {peak}")
    if (shape := run_shape(session)) is not None:
        on_cpu = world.device.type == "cpu"
        half = built.precision != "fp32"
        memory = plan_memory(config, shape, geometry, half_precision=half, on_cpu=on_cpu)
        stage("MODEL", f"about {memory.total / 2**30:.2f} GiB per rank")
    stage("DDP", f"{engine_name(config, world)} on {world.world_size} process(es), {world.device}")
    batch = f"{geometry.micro_batch_size} rows x {geometry.grad_accum_steps} micro-batches x {world.world_size} ranks"
    stage(
        "STEP",
        f"{session.total_steps} steps of {geometry.tokens_per_step:,} tokens: {batch} of {geometry.seq_len}",
    )
