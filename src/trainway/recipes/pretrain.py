"""Pretraining: documents → tokens → a language model trained from its first weights, checkpointed and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from torch import nn

from trainway.checkpoint.lock import run_lock
from trainway.config.schema import RunConfig
from trainway.data.loader import Loader, validation_batches
from trainway.data.prepare import prepare
from trainway.engines import build_learner, choose_precision, engine_name
from trainway.engines.base import Learner
from trainway.engines.precision import autocast
from trainway.engines.world import open_world
from trainway.files import disk_faults
from trainway.logs import stage, start_logging
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.load import build_model
from trainway.planning.arithmetic import count_parameters, flops_per_token, memory_bytes
from trainway.planning.geometry import shard_count
from trainway.run_dir import RunDir
from trainway.tracking import open_trackers
from trainway.tracking.jsonl import cut_after
from trainway.training.evaluate import continue_prompts, evaluate_batches
from trainway.training.loop import Work, fit
from trainway.training.runs import Resume, choose_run_dir, run_status, write_status
from trainway.training.session import (
    RunResult,
    Session,
    begin_session,
    finish,
    finished_before,
    make_saver,
    recorded_end,
    starting_state,
)
from trainway.training.shutdown import StopSignal
from trainway.training.sources import describe_sources, source_metrics
from trainway.training.speed import SpeedMeter, peak_flops


def pretrain(
    config: RunConfig,
    *,
    resume: Resume = "auto",
    allow_changes: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> RunResult:
    """Train a model from scratch, or go on with a run that was stopped or killed.

    Args:
        resume: `auto` goes on from the newest intact checkpoint, `never` begins a new run, a number resumes there.
        allow_changes: go on although settings or data differ from those the run began with.
        progress: told (label, bytes done, bytes in all) while the data is prepared.

    Raises:
        UserError: the message says what to do; nothing that was saved before is lost.
        Stopped: SIGTERM or SIGINT came; the last finished step is saved.
    """
    with ExitStack() as stack:
        # Before the process group exists: preparing may take longer than a collective may wait.
        prepared = prepare(config, progress=progress)
        world = stack.enter_context(open_world(config.engine, config.train.num_threads))
        start_logging(config.log.level, is_main=world.is_main)
        run = RunDir(Path(world.from_main(str(choose_run_dir(config, resume).path) if world.is_main else "")))
        world.together(lambda: stack.enter_context(run_lock(run)) if world.is_main else None)
        stack.enter_context(disk_faults(run.path))
        if run_status(run)["state"] == "done" and resume == "auto":
            return finished_before(config, run, allow_changes)
        session = begin_session(config, world, run, prepared, resume, allow_changes)
        stop = stack.enter_context(StopSignal())
        return _train(session, stop)


def _train(session: Session, stop: StopSignal) -> RunResult:
    config, world, run = session.config, session.world, session.run
    loss_module, learner = _build(session)
    state = starting_state(session, learner)
    resumed = state.step > 0
    if world.is_main:
        for records in (run.metrics, run.samples):
            cut_after(records, state.step if resumed else -1)
        write_status(run, "running", state.step)
    flops = flops_per_token(config.model, session.vocab_size, config.train.seq_len)
    peak, peak_source = peak_flops(world.device)
    _describe(session, flops, f"peak {peak / 1e12:.2f} TFLOP/s per device ({peak_source})")

    with ExitStack() as stack:
        first_step = state.step + 1 if resumed else 0
        trackers = open_trackers(config.tracking, run, first_step=first_step, is_main=world.is_main)
        stack.callback(trackers.close)

        def evaluate(step: int) -> float:
            metrics = _evaluate(session, loss_module)
            trackers.log(step, {**metrics, **source_metrics(session, step)})
            stage(
                "EVAL", f"step {step}: loss {metrics['val/loss']:.4f}  {metrics['val/bpb']:.4f} bits per byte"
            )
            _write_samples(session, learner, loss_module, step)
            return metrics["val/loss"]

        work = Work(
            config=config,
            geometry=session.geometry,
            total_steps=session.total_steps,
            world=world,
            learner=learner,
            loader=_loader(session),
            meter=SpeedMeter(session.geometry.tokens_per_step, flops, peak * world.world_size, world.device),
            trackers=trackers,
            stop=stop,
            evaluate=evaluate,
            saver=make_saver(session, learner),
        )
        with recorded_end(session):
            if not resumed:
                evaluate(0)
            state = fit(work, state)
    return finish(session, state, work.saver.stalled_s)


def _build(session: Session) -> tuple[CausalLMLoss, Learner]:
    config, tokenizer = session.config, session.tokenizer
    model = build_model(
        config.model,
        session.vocab_size,
        seed=config.seed,
        device="meta",  # the engine knows which of the weights this rank holds
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    model.train()
    blocks = model.get_submodule(model.base_model_prefix).layers
    if config.train.activation_checkpointing != "none":
        checkpoint_activations(blocks, config.train.activation_checkpointing)
    if config.train.compile:
        for block in blocks:
            block.compile()
    loss_module = CausalLMLoss(model, chunk_tokens=config.train.loss_chunk_tokens, z_loss=config.train.z_loss)
    return loss_module, build_learner(config, loss_module, model, session.world)


def _loader(session: Session) -> Loader:
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


def _evaluate(session: Session, loss_module: nn.Module) -> dict[str, float]:
    config, world = session.config, session.world
    batches = validation_batches(
        session.store.split("val"),
        seq_len=config.train.seq_len,
        micro_batch_size=session.geometry.micro_batch_size,
        packing=config.data.packing,
        max_tokens=config.eval.max_tokens,
        rank=world.rank,
        world_size=world.world_size,
    )
    precision = choose_precision(config.train.precision, world.device)
    return evaluate_batches(loss_module, batches, session.store.token_bytes, world, precision)


def _write_samples(session: Session, learner: Learner, loss_module: CausalLMLoss, step: int) -> None:
    if not (session.world.is_main or learner.is_sharded):
        return
    config = session.config
    samples = continue_prompts(
        loss_module,
        session.tokenizer,
        config.eval.prompts or islice(_openings(session), config.eval.num_samples),
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.seed,
    )
    with autocast(choose_precision(config.train.precision, session.world.device), session.world.device):
        lines = [json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples]
    if session.world.is_main:
        with session.run.samples.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def _openings(session: Session, num_tokens: int = 16) -> Iterator[str]:
    """The first tokens of the validation documents, as text."""
    split = session.store.split("val")
    starts = [int(start) for start in split.document_starts(0, split.num_tokens)]
    for start, end in zip(starts, [*starts[1:], split.num_tokens], strict=True):
        tokens = split.tokens(start, min(start + num_tokens, end))
        yield session.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def _describe(session: Session, flops: float, peak: str) -> None:
    """Say what is about to run, before the first step."""
    config, geometry, world = session.config, session.geometry, session.world
    precision = choose_precision(config.train.precision, world.device)
    counts = count_parameters(config.model, session.vocab_size)
    memory = memory_bytes(
        config.model,
        session.vocab_size,
        micro_batch_size=geometry.micro_batch_size,
        seq_len=geometry.seq_len,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        optimizer=config.optim.name,
        checkpointing=config.train.activation_checkpointing,
        shards=shard_count(config.engine, world.world_size),
        half_precision=precision != "fp32",
    )
    describe_sources(session)
    stage("MODEL", f"{config.model.architecture}: {counts.total:,} parameters, {flops:,.0f} FLOPs per token")
    stage("MODEL", f"about {memory.total / 2**30:.2f} GiB per rank, {precision}, {peak}")
    stage("DDP", f"{engine_name(config, world)} on {world.world_size} process(es), {world.device}")
    batch = f"{geometry.micro_batch_size} rows x {geometry.grad_accum_steps} micro-batches x {world.world_size} ranks"
    stage(
        "STEP",
        f"{session.total_steps} steps of {geometry.tokens_per_step:,} tokens: {batch} of {geometry.seq_len}",
    )
