"""The benchmark of pretraining and fine-tuning: their loop as it is, on the benchmark's batches."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from trainway.planning.forecast import Basis, checkpoint_bytes
from trainway.recipes.bench_steps import (
    DTYPES,
    Bench,
    BenchBatches,
    Course,
    Found,
    NoSaver,
    Peaks,
    StepMeter,
    make_part,
    measure_save,
    timed_together,
)
from trainway.recipes.supervised import (
    Opened,
    Prompts,
    make_loader,
    open_training,
    run_validation,
    write_samples,
)
from trainway.training.loop import fit
from trainway.training.session import Session
from trainway.training.shutdown import StopSignal
from trainway.training.speed import MemoryMark
from trainway.training.stopwatch import Stopwatch, TimedLearner

PROBE_BATCHES = 16
"""Micro-batches of one rank of which an evaluation's time is taken, where it has more."""
PROBE_PROMPTS = 3


def bench_supervised(session: Session, prompts: Prompts, stop: StopSignal, asked: Bench) -> Found:
    """Take the benchmark's steps, then a piece of an evaluation and one save."""
    world = session.world
    mark = MemoryMark.now(world.device, forget_peak=True)
    with ExitStack() as stack:
        opened = open_training(session, prompts, stop, stack)
        ready = time.time()
        built, work = opened.built, opened.work
        peaks = Peaks(world, DTYPES[built.precision])
        course = Course(asked, world, mark, Stopwatch(world.device))
        meter = StepMeter(built.flops_per_token, peaks.peak * world.world_size, world.device)
        timed = replace(
            work,
            total_steps=max(session.total_steps, course.total + 1),  # nothing is due at the last of ours
            learner=TimedLearner(opened.learner, course.watch),
            loader=BenchBatches(make_loader(session), course),
            meter=meter,
            saver=NoSaver.like(work.saver),
        )
        fit(timed, opened.state)
        part = make_part("train", session.total_steps, course, meter.tokens, built.flops_per_token, peaks)
        evaluation_s, basis = _evaluation(session, prompts, opened, asked)
        census = built.census
        size = checkpoint_bytes(census.total, census.trainable, lora=session.config.lora.enabled)
        save = measure_save(work.saver, opened.state, asked.scratch, size)
    return Found(
        built=built,
        ready=ready,
        parts=[part],
        steps_s=session.total_steps * part.step_s.mean,
        ends=(),
        flops_per_token=built.flops_per_token,
        gemm_flops=peaks.gemm,
        peak_bytes=course.peak_bytes,
        first_peak_bytes=course.first_peak_bytes,
        evaluation_s=evaluation_s,
        evaluation_basis=basis,
        save=save,
    )


def _evaluation(session: Session, prompts: Prompts, opened: Opened, asked: Bench) -> tuple[float, Basis]:
    """Seconds of one evaluation and its samples; modelled where a part was measured and the rest is like it."""
    world, geometry, wanted = session.world, session.geometry, asked.config.eval
    whole = session.store.split("val").num_tokens
    whole = whole if wanted.max_tokens is None else min(whole, wanted.max_tokens)
    tokens = min(whole, PROBE_BATCHES * geometry.micro_batch_size * geometry.seq_len * world.world_size)
    samples = len(wanted.prompts) or wanted.num_samples
    tried = min(samples, PROBE_PROMPTS)

    def limited(max_tokens: int) -> Session:
        settings = {"max_tokens": max_tokens, "prompts": wanted.prompts[:tried], "num_samples": tried}
        config = session.config
        return replace(
            session, config=config.model_copy(update={"eval": config.eval.model_copy(update=settings)})
        )

    run_validation(limited(1), opened.loss_module)  # the first one warms up
    seconds = timed_together(world, lambda: run_validation(limited(tokens), opened.loss_module))
    seconds *= whole / tokens
    if tried:
        sampling = timed_together(
            world,
            lambda: write_samples(limited(tokens), prompts, opened.learner, opened.loss_module, 0),
        )
        seconds += sampling * samples / tried
    return seconds, "measured" if (tokens, tried) == (whole, samples) else "modelled"
