"""Adversarial distillation: a teacher's text → a student that writes like it, against a discriminator that learns along."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainway.checkpoint.state import TrainState
from trainway.checkpoint.weights import DISCRIMINATOR_DIR, write_model
from trainway.config.schema import RunConfig
from trainway.data.teacher import end_tokens, own_template
from trainway.data.teacher_rows import TeacherLoader, validation_rows
from trainway.engines import build_learner, choose_precision, engine_name
from trainway.engines.base import Learner
from trainway.engines.precision import Precision
from trainway.errors import ConfigError
from trainway.gad.loop import Work, fit
from trainway.gad.phases import Players
from trainway.gad.samples import write_samples
from trainway.gad.student import StudentLoss
from trainway.gad.validation import validate
from trainway.gad.warmup import Warmup, find_warmup
from trainway.logs import stage as log_stage
from trainway.models.base import BaseModel, find_base
from trainway.models.discriminator import DiscriminatorLoss, scoring_tokenizer
from trainway.models.lora import check_gradients
from trainway.models.published import publish_names
from trainway.planning.gad import Stage, describe_stages, gad_stages, stage_seed
from trainway.recipes.measuring import record_run
from trainway.recipes.model import RunModel, build_run_discriminator, build_run_model
from trainway.recipes.opening import run_recipe
from trainway.release.bundle import publish
from trainway.rollout.base import RolloutEngine, Sampling
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
from trainway.training.sources import describe_sources
from trainway.training.speed import MemoryMark, SpeedMeter


def gad(config: RunConfig, **how: Any) -> RunResult:
    """Train `model.path` on a teacher's answers, through the stages of gad.stage; see `run_recipe` for the arguments."""
    critic = find_discriminator(config)
    return run_recipe(config, lambda session, stop: _train(session, stop, critic), **how)


def find_discriminator(config: RunConfig) -> BaseModel | None:
    """The model that gad.discriminator names; None where the discriminator begins as the student."""
    if config.gad.discriminator is None or config.gad.stage in ("seqkd", "adversarial"):
        return None
    return find_base(config.gad.discriminator, cache=Path(config.data.store_dir), needs_tokenizer=False)


@dataclass(frozen=True)
class Opened:
    """A run before its first step."""

    work: Work
    state: TrainState
    """Where it goes on; step 0 for a new one."""
    learners: dict[str, Learner]
    resumed: bool
    warmup: Warmup | None
    """The checkpoint that a new run begins with, if it does."""
    built: RunModel
    """The student."""
    mark: MemoryMark
    """The memory of this process before the models."""


def _train(session: Session, stop: StopSignal, critic: BaseModel | None) -> RunResult:
    with ExitStack() as stack:
        opened = open_training(session, stop, critic, stack)
        work, state = opened.work, opened.state
        with recorded_end(session):
            if not opened.resumed:
                state = _begin(opened)
            state = fit(work, state)
    record_run(session, opened.built, work.meter, opened.mark)
    return finish(session, state, work.saver.stalled_s, opened.built.census)


def open_training(session: Session, stop: StopSignal, critic: BaseModel | None, stack: ExitStack) -> Opened:
    """Build the models, load what the run goes on from, and all that the loop works with; `stack` closes it."""
    config, world, run = session.config, session.world, session.run
    mark = MemoryMark.now(world.device)
    resumed = world.from_main(bool(session.checkpoints.steps()) if world.is_main else None)
    warmup = None if resumed else _find_warmup(session)
    stages = gad_stages(config, session.prepared.rows_per_epoch(config.train.seq_len))
    assert stages is not None, "the number of rows is known"
    session.checkpoints.pinned = {stage.before for stage in stages if stage.name == "adversarial"}
    ends = end_tokens(session.tokenizer, own_template(session.tokenizer))
    judged = scoring_tokenizer(session.tokenizer, ends)
    student, built = _student(session, stages[0])
    learners: dict[str, Learner] = {STUDENT: student}
    if config.gad.stage != "seqkd":
        learners[DISCRIMINATOR_DIR] = _discriminator(session, critic, judged.pad_token_id)
    state = starting_state(session, learners)
    trackers = stack.enter_context(open_records(session, state, resumed=resumed))
    _describe(session, stages)
    sampling = Sampling(
        config.data.max_response_tokens,
        config.rollout.temperature,
        config.rollout.top_p,
        ends,
    )
    precision = choose_precision(config.train.precision, world.device)
    engine = _rollouts(session, student, precision)
    stack.callback(engine.close)
    players = Players(
        gad=config.gad,
        rollout=config.rollout,
        world=world,
        student=student,
        discriminator=learners.get(DISCRIMINATOR_DIR),
        engine=engine,
        # DeepSpeed's model is of the type that it computes in
        precision="fp32" if engine_name(config, world) in ("zero2", "zero3") else precision,
        pad_id=session.store.streams()[0].pad_id,
        packed=config.data.packing == "documents",
    )
    held_out = validation_rows(session.store.split("val"), config.eval.num_prompts, end_token=ends[0])

    def check(step: int, stage: Stage) -> dict[str, float]:
        figures, samples = validate(
            players, session.tokenizer, held_out, sampling, step, config.eval.num_samples
        )
        trackers.log(step, {"gad/stage": stage.name, **figures})
        if world.is_main:
            write_samples(run.samples, samples)
        log_stage("EVAL", f"step {step}: {_summary(figures)}")
        return figures

    def check_first_step(learner: Learner) -> None:
        if config.lora.enabled:
            check_gradients(learner.model, learner.snapshot(), world.sum)

    work = Work(
        config=config,
        stages=stages,
        players=players,
        sampling=sampling,
        loaders={stage.name: stage_loader(session, stage) for stage in stages},
        meter=SpeedMeter(0.0, 0.0, world.device, session.pace),
        trackers=trackers,
        stop=stop,
        validate=check,
        saver=make_saver(session, learners, {DISCRIMINATOR_DIR: judged}),
        checkpoints=session.checkpoints,
        check_first_step=check_first_step,
    )
    return Opened(work, state, learners, resumed, warmup, built, mark)


def _begin(opened: Opened) -> TrainState:
    """Step 0: the warm-up's weights, if it begins there, a look at the student, and the checkpoint it is measured by."""
    work, state = opened.work, opened.state
    read_warmup(opened)
    work.validate(0, work.stages[0])
    if opened.warmup is not None:
        work.trackers.sync()
        work.saver.save(state)
    return state


def read_warmup(opened: Opened) -> None:
    """Begin with the weights of the warm-up that the configuration names, if it names one."""
    if (warmup := opened.warmup) is None:
        return
    for name, learner in opened.learners.items():
        learner.read(warmup.path / name, weights_only=True)
    log_stage("STAGE", f"student and discriminator from {warmup.path} (step {warmup.step})")


def _student(session: Session, first: Stage) -> tuple[Learner, RunModel]:
    config = session.config
    if first.name == "seqkd":
        config = _with_lr(config, config.gad.seqkd_lr)
    built = build_run_model(session)
    _check_positions(config, built.model)
    no_dropout(built.model)
    module = StudentLoss(built.model, chunk_tokens=config.train.loss_chunk_tokens)
    for note in built.notes:
        log_stage("MODEL", f"student: {note}")
    return build_learner(config, module, built.model, session.world, built.weights), built


def _check_positions(config: RunConfig, model: PreTrainedModel) -> None:
    """Raises ConfigError where a prompt and its answer may be longer than the model knows positions."""
    data, known = config.data, getattr(model.config, "max_position_embeddings", None)
    longest = data.max_prompt_tokens + data.max_response_tokens
    if known is not None and longest > known:
        raise ConfigError(
            f"data.max_prompt_tokens {data.max_prompt_tokens} and data.max_response_tokens "
            f"{data.max_response_tokens} are {longest} tokens",
            f"{config.model.path} knows {known} positions",
            f"lower them to {known} together",
        )


def _discriminator(session: Session, base: BaseModel | None, pad_id: int) -> Learner:
    config = session.config
    config = _with_lr(config, config.gad.discriminator_lr or config.optim.lr)
    base = base or session.base
    assert base is not None, "the configuration demands model.path"
    built = build_run_discriminator(session, base, pad_id)
    no_dropout(built.model)
    for note in built.notes:
        log_stage("MODEL", f"discriminator: {note}")
    return build_learner(config, DiscriminatorLoss(built.model), built.model, session.world, built.weights)


def _find_warmup(session: Session) -> Warmup | None:
    """Where stage adversarial begins; None for every other."""
    config, world = session.config, session.world
    if config.gad.warmup_run is None or config.gad.stage != "adversarial":
        return None
    path, tokenizer_hash = config.gad.warmup_run, session.store.manifest.tokenizer_hash

    def find() -> Warmup:
        return find_warmup(path, base_hash=session.base_hash, tokenizer_hash=tokenizer_hash)

    found = world.from_main(world.together(lambda: [str(part) for part in find()] if world.is_main else None))
    return Warmup(Path(found[0]), int(found[1]))


def _rollouts(session: Session, student: Learner, precision: Precision) -> RolloutEngine:
    config, base = session.config, session.base
    match config.rollout.engine, config.rollout.batching:
        case "vllm", _:
            from trainway.rollout.vllm import open_vllm

            assert base is not None, "the configuration demands model.path"
            return open_vllm(
                config.rollout,
                session.world,
                base.directory,
                lambda directory: write_student(session, student, directory),
                precision=precision,
                max_tokens=config.data.max_prompt_tokens + config.data.max_response_tokens,
            )
        case _, "continuous":
            from trainway.rollout.continuous import ContinuousRollout

            return ContinuousRollout(student, config.rollout.batch_size)
        case _:
            from trainway.rollout.transformers import TransformersRollout

            return TransformersRollout(student, config.rollout.batch_size)


def write_student(session: Session, student: Learner, directory: Path) -> None:
    """Write the student's present weights as one plain model into a directory; every rank calls it together.

    Raises OSError of the disk.
    """
    world, snapshot = session.world, student.snapshot()
    parts = directory / "parts"

    def write() -> None:
        if snapshot.part is not None:
            place = directory if snapshot.part.count == 1 else parts
            write_model(student.model, place, session.tokenizer, weights=snapshot.weights, part=snapshot.part)

    def join() -> None:
        if parts.is_dir():
            publish(parts, directory)
            shutil.rmtree(parts)
        else:
            publish_names(directory)

    world.together(write)
    world.together(lambda: join() if world.is_main else None)


def no_dropout(model: nn.Module) -> None:
    """Turn dropout off: what is scored in one pass is trained in another, and both must see the same model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _with_lr(config: RunConfig, lr: float) -> RunConfig:
    return config.model_copy(update={"optim": config.optim.model_copy(update={"lr": lr})})


def stage_loader(session: Session, stage: Stage) -> TeacherLoader:
    """The rows of a stage, in an order of its own."""
    config = session.config
    ends = end_tokens(session.tokenizer, own_template(session.tokenizer))
    return TeacherLoader(
        session.store.streams(),
        end_token=ends[0],
        mix=session.prepared.mix,
        prompts_per_step=session.geometry.global_batch_size,
        seed=stage_seed(config.seed, stage),
        shuffle=config.data.shuffle,
    )


def _describe(session: Session, stages: tuple[Stage, ...]) -> None:
    config, geometry, world = session.config, session.geometry, session.world
    describe_sources(session)
    log_stage("DDP", f"{engine_name(config, world)} on {world.world_size} process(es), {world.device}")
    prompts = f"{geometry.global_batch_size} prompts a step, {geometry.steps_per_epoch} steps an epoch"
    log_stage("STAGE", f"{describe_stages(stages)}; {prompts}")


def _summary(figures: dict[str, float]) -> str:
    shown = f"loss {figures['val/loss']:.4f}  ROUGE-L {figures['val/rouge_l']:.3f}"
    shown += f"  length {figures['val/length']:.1f} (teacher {figures['val/teacher_length']:.1f})"
    shown += f"  truncated {figures['val/truncated']:.0%}"
    if "val/discriminator_accuracy" in figures:
        shown += f"  discriminator {figures['val/discriminator_accuracy']:.0%}"
    return shown
