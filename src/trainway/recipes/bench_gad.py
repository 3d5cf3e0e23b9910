"""The benchmark of adversarial distillation: its loop as it is, for some steps of each of its stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from statistics import mean

from trainway.gad.loop import fit
from trainway.models.base import BaseModel
from trainway.planning.forecast import Basis, checkpoint_bytes
from trainway.planning.gad import Stage
from trainway.recipes.bench_result import Part
from trainway.recipes.bench_steps import (
    DTYPES,
    Bench,
    BenchRows,
    Course,
    Finished,
    Found,
    NoSaver,
    Peaks,
    StepMeter,
    make_part,
    measure_save,
    timed_together,
)
from trainway.recipes.gad import Opened, open_training, read_warmup, stage_loader
from trainway.rollout.base import Request, Rollout, RolloutEngine, Sampling
from trainway.training.session import Session
from trainway.training.shutdown import StopSignal
from trainway.training.speed import MemoryMark
from trainway.training.stopwatch import Stopwatch, TimedLearner


def bench_gad(session: Session, stop: StopSignal, critic: BaseModel | None, asked: Bench) -> Found:
    """Take the benchmark's steps, an equal share in each stage, then a piece of a validation and one save.

    How long answers are is the student's choice, and it is the student of the beginning that answers here.
    """
    world, mark = session.world, MemoryMark.now(session.world.device, forget_peak=True)
    prompts = asked.config.eval.num_prompts
    at_once = asked.config.rollout.batch_size * world.world_size
    with ExitStack() as stack:
        opened = open_training(_with_prompts(session, min(prompts, at_once)), stop, critic, stack)
        read_warmup(opened)
        ready = time.time()
        stages = opened.work.stages
        share = replace(asked, steps=-(-asked.steps // len(stages)))
        peaks = Peaks(world, DTYPES[opened.built.precision])
        courses = [Course(share, world, mark, Stopwatch(world.device)) for _ in stages]
        parts = [
            _bench_stage(session, opened, stage, course, peaks)
            for stage, course in zip(stages, courses, strict=True)
        ]
        work = opened.work
        seconds = timed_together(world, lambda: work.validate(0, stages[-1]))
        rounds = -(-prompts // at_once)
        basis: Basis = "measured" if rounds == 1 else "modelled"
        census = opened.built.census
        size = checkpoint_bytes(census.total, census.trainable, lora=session.config.lora.enabled)
        save = measure_save(work.saver, opened.state, asked.scratch, size * len(opened.learners))
    return Found(
        built=opened.built,
        ready=ready,
        parts=parts,
        steps_s=sum(_stage_seconds(session, part) for part in parts),
        ends=[stage.last for stage in stages],
        flops_per_token=0.0,
        gemm_flops=peaks.gemm,
        peak_bytes=courses[-1].peak_bytes,
        first_peak_bytes=courses[-1].first_peak_bytes,
        evaluation_s=seconds * rounds,
        evaluation_basis=basis,
        save=save,
    )


def _with_prompts(session: Session, count: int) -> Session:
    """The session with so many prompts in a validation."""
    settings = session.config.eval.model_copy(update={"num_prompts": count})
    return replace(session, config=session.config.model_copy(update={"eval": settings}))


def _bench_stage(session: Session, opened: Opened, stage: Stage, course: Course, peaks: Peaks) -> Part:
    """The steps of one stage, by itself and from its first step; both models learn in each of them."""
    work, watch = opened.work, course.watch
    players = work.players
    critic = players.discriminator
    timed = replace(
        players,
        student=TimedLearner(players.student, watch),
        discriminator=None if critic is None else TimedLearner(critic, watch),
        engine=_TimedEngine(players.engine, watch),
    )
    meter = StepMeter(0.0, 0.0, session.world.device, timed.seconds)
    gad = work.config.gad.model_copy(update={"discriminator_only_steps": 0})
    alone = replace(
        work,
        config=work.config.model_copy(update={"gad": gad}),
        # nothing is due at the last of our steps
        stages=(replace(stage, before=0, steps=max(stage.steps, course.total + 1)),),
        players=timed,
        loaders={stage.name: BenchRows(stage_loader(session, stage), course)},
        meter=meter,
        saver=NoSaver.like(work.saver),
    )
    with suppress(Finished):
        fit(alone, opened.state)
    part = make_part(stage.name, stage.steps, course, meter.tokens, 0.0, peaks)
    counted = meter.seconds_by_name[course.bench.warm_up :][: part.steps]
    names = dict.fromkeys(name for step in counted for name in step)
    return replace(part, gad_s={name: mean(step.get(name, 0.0) for step in counted) for name in names})


def _stage_seconds(session: Session, part: Part) -> float:
    """Of all its steps: in the first ones of a warm-up the student does not learn."""
    idle = 0
    if part.name == "warmup":
        idle = min(part.run_steps, session.config.gad.discriminator_only_steps)
    return part.run_steps * part.step_s.mean - idle * part.gad_s.get("student", 0.0)


@dataclass(frozen=True)
class _TimedEngine:
    """A rollout engine as it is, timed."""

    engine: RolloutEngine
    watch: Stopwatch

    def sync(self) -> None:
        with self.watch.phase("rollout"):
            self.engine.sync()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        with self.watch.phase("rollout"):
            return self.engine.generate(requests, sampling)

    def close(self) -> None:
        self.engine.close()
