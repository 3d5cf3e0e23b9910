"""The life of a run on disk: opened under its lock, resumed, saved, and ended with a status and a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainway.checkpoint.state import STATE_FILE, TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.config.load import dump_config
from trainway.config.mixes import train_sources
from trainway.config.schema import RunConfig
from trainway.data.hub_sources import hub_source
from trainway.data.prepare import PreparedData
from trainway.data.store import TokenStore
from trainway.data.tokenizer import load_tokenizer
from trainway.engines import engine_name
from trainway.engines.base import Learner
from trainway.engines.world import World
from trainway.errors import ConfigError, DataError, EnvironmentFault, Stopped
from trainway.files import atomic_write
from trainway.logs import log_to_file, stage, warn
from trainway.models.base import BaseModel
from trainway.models.census import Census
from trainway.planning.geometry import Geometry, resolve_geometry
from trainway.provenance import collect_provenance, config_hash
from trainway.run_dir import RunDir
from trainway.tracking import Trackers, open_trackers
from trainway.tracking.jsonl import cut_after
from trainway.training.pace import PaceWatch
from trainway.training.progress import clock
from trainway.training.runs import Resume, refuse_changed_settings, write_status
from trainway.training.saving import STUDENT, Saver
from trainway.training.speed import device_name, peak_memory_gib


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    run_dir: Path
    step: int
    val_loss: float | None
    report: dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What is fixed before the first step: settings, processes, directory, data, batch geometry."""

    config: RunConfig
    world: World
    run: RunDir
    checkpoints: CheckpointStore
    store: TokenStore
    prepared: PreparedData
    data_hash: str
    tokenizer: PreTrainedTokenizerBase
    base: BaseModel | None
    """The model that the run starts from; None for a new one."""
    geometry: Geometry
    resume: Resume
    allow_changes: bool
    pace: PaceWatch | None
    """What warns of a run that becomes slow."""
    preparing_s: float
    """For which this launch made the token store; 0 where it was ready."""

    @property
    def base_hash(self) -> str:
        """Of the model that the run starts from; empty for a new one."""
        return self.base.identity if self.base else ""

    @property
    def total_steps(self) -> int:
        assert self.geometry.total_steps is not None  # the number of rows is known
        return self.geometry.total_steps


def begin_session(
    config: RunConfig,
    world: World,
    run: RunDir,
    prepared: PreparedData,
    base: BaseModel | None,
    resume: Resume,
    allow_changes: bool,
    preparing_s: float = 0.0,
) -> Session:
    """Settle everything that the run needs; rank 0, which holds the lock, checks and describes its directory.

    Raises:
        ConfigError: the batch does not divide, or the run was begun with other settings.
        EnvironmentFault: a rank has read other data, or another model to start from, than rank 0.
    """
    store = TokenStore.open(prepared.store_dir, verify=False)  # prepare has just verified it
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    session = Session(
        config=config,
        world=world,
        run=run,
        checkpoints=CheckpointStore(run.checkpoints, config.checkpoint.keep_last),
        store=store,
        prepared=prepared,
        data_hash=prepared.store_dir.name,
        tokenizer=tokenizer,
        base=base,
        geometry=resolve_geometry(config, world.world_size, prepared.rows_per_epoch(config.train.seq_len)),
        resume=resume,
        allow_changes=allow_changes,
        preparing_s=preparing_s,
        pace=PaceWatch(config.watchdog, world.rank) if config.watchdog.enabled else None,
    )
    world.together(lambda: _check_agreement(world, session.data_hash, session.base_hash))
    world.together(lambda: _open_directory(session) if world.is_main else None)
    return session


def _check_agreement(world: World, data_hash: str, base_hash: str) -> None:
    own = {"data": data_hash, "model.path": base_hash}
    other = [name for name, value in world.from_main(own).items() if own[name] != value]
    if other:
        raise EnvironmentFault(
            f"rank {world.rank} has read other files of {' and '.join(other)} than rank 0",
            "they lie elsewhere on its machine, or changed while they were read",
            "give every machine the same files (a model of the Hub: set model.revision to a commit), and start again",
        )


def starting_state(session: Session, learners: Mapping[str, Learner]) -> TrainState:
    """Load the checkpoint to go on from into `learners` (see `Saver`), or begin at step 0.

    Raises:
        ConfigError: the step asked for does not exist (those that do are listed), or the batch changed.
        DataError: data or tokenizer changed, or checkpoints exist and none is intact.
    """
    world, checkpoints = session.world, session.checkpoints
    found = world.from_main(world.together(lambda: _checkpoint_to_resume(session) if world.is_main else None))
    path = Path(found) if found else None
    if path is None:
        return TrainState(
            step=0,
            tokens_seen=0,
            samples_seen=0,
            best_val_loss=None,
            best_step=None,
            last_val_loss=None,
            skipped_steps=0,
            guard={},
            scaler={},
            elapsed_s=0.0,
            config_hash=config_hash(session.config.model_dump(mode="json")),
            data_hash=session.data_hash,
            tokenizer_hash=session.store.manifest.tokenizer_hash,
            base_hash=session.base_hash,
        )
    state = TrainState.from_json((path / STATE_FILE).read_text(), str(path / STATE_FILE))
    if not session.allow_changes:
        _refuse_other_data(session, state, path)
    for name, learner in learners.items():
        learner.read(path / name)
    learners[STUDENT].load_state(state.scaler)
    if world.is_main:
        # Only now, when nothing can refuse any more: what lies after this step is another future, or damaged.
        for step in checkpoints.discard_after(state.step):
            warn(f"the checkpoint of step {step} is removed: the run goes on from step {state.step}")
    stage("STEP", f"going on from {path} (step {state.step} of {session.total_steps})")
    return state


@contextmanager
def open_records(session: Session, state: TrainState, *, resumed: bool) -> Iterator[Trackers]:
    """The run's trackers, and what was recorded after `state`, a future that will not be, cut off before."""
    run, is_main = session.run, session.world.is_main
    if is_main:
        for records in (run.metrics, run.samples):
            cut_after(records, state.step if resumed else -1)
        write_status(run, "running", state.step)
    first_step = state.step + 1 if resumed else 0
    trackers = open_trackers(session.config, run, first_step=first_step, is_main=is_main)
    outcome = "failed"
    try:
        yield trackers
        outcome = "done"
    except Stopped:
        outcome = "stopped"
        raise
    finally:
        trackers.close(outcome)


def make_saver(
    session: Session,
    learners: Mapping[str, Learner],
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = MappingProxyType({}),
) -> Saver:
    """What writes the checkpoints of this run; `tokenizers`: where they are not the session's."""

    def saved(state: TrainState) -> None:
        write_status(session.run, "running", state.step, val_loss=state.last_val_loss)
        stage("SAVE", f"checkpoint of step {state.step}")

    return Saver(
        world=session.world,
        learners=learners,
        store=session.checkpoints,
        tokenizers={name: tokenizers.get(name, session.tokenizer) for name in learners},
        asynchronous=session.config.checkpoint.async_save,
        saved=saved,
    )


@contextmanager
def recorded_end(session: Session) -> Iterator[None]:
    """Record in the run's status how training ended when it does not end well."""
    try:
        yield
    except BaseException as error:
        if session.world.is_main:
            stopped = isinstance(error, Stopped)
            step = error.step if isinstance(error, Stopped) else max(session.checkpoints.steps(), default=0)
            write_status(session.run, "stopped" if stopped else "failed", step, error=str(error))
            stage("DONE", f"{'stopped' if stopped else 'failed'}; the same command goes on from step {step}")
        if isinstance(error, Stopped):
            session.world.barrier()  # a launcher ends the other ranks as soon as the first one is gone
        raise


def finish(session: Session, state: TrainState, save_stall_s: float, census: Census) -> RunResult:
    """Write report.json and the final status. `save_stall_s`: for which this launch waited for its saves."""
    world, run, seconds = session.world, session.run, state.elapsed_s
    world.pulse.enter("end", long=True)
    report = {
        "world_size": world.world_size,
        "engine": engine_name(session.config, world),
        "device": str(world.device),
        "steps": state.step,
        "tokens": state.tokens_seen,
        "seconds": seconds,
        "tokens_per_s": state.tokens_seen / seconds if seconds else 0.0,
        "parameters": census.total,
        "trainable_parameters": census.trainable,
        "val_loss": state.last_val_loss,
        "best_val_loss": state.best_val_loss,
        "best_step": state.best_step,
        "skipped_steps": state.skipped_steps,
        "save_stall_s": save_stall_s,
        "peak_memory_gib": peak_memory_gib(world.device),
    }
    if world.is_main:
        atomic_write(run.report, json.dumps(report, indent=2) + "\n")
        write_status(run, "done", state.step, val_loss=state.last_val_loss)
        speed = f"{report['tokens_per_s']:,.0f} tokens/s"
        stage(
            "RESULT", f"validation loss {state.last_val_loss:.4f} after {state.tokens_seen:,} tokens, {speed}"
        )
        stage("DONE", f"{state.step} steps in {clock(seconds)}: {run.path}")
    world.barrier()
    return RunResult(run.path, state.step, state.last_val_loss, report)


def finished_before(config: RunConfig, run: RunDir, allow_changes: bool) -> RunResult:
    """The result of a run that is done: starting it again does nothing.

    Raises:
        ConfigError: the settings are not those of that run.
    """
    if not allow_changes:
        refuse_changed_settings(config, run)
    report = json.loads(run.report.read_text())
    stage("DONE", f"{run.path} finished before ({report['steps']} steps): nothing to do")
    return RunResult(run.path, report["steps"], report["val_loss"], report)


def _open_directory(session: Session) -> None:
    config, run, checkpoints = session.config, session.run, session.checkpoints
    checkpoints.clean()
    if session.resume == "never" and (steps := checkpoints.steps()):
        raise ConfigError(
            f"{run.path} holds a run already (checkpoints of steps {', '.join(map(str, steps))})",
            "--resume never begins a new run, and would mix its files with the old one's",
            "choose another run_dir or name, or go on with --resume auto",
        )
    if not session.allow_changes:
        refuse_changed_settings(config, run)
    log_to_file(run.log)
    atomic_write(run.config, dump_config(config))
    provenance = collect_provenance(config_hash(config.model_dump(mode="json")), session.data_hash, sys.argv)
    provenance |= _origin(session)
    atomic_write(run.provenance, json.dumps(provenance, indent=2) + "\n")


def _origin(session: Session) -> dict[str, Any]:
    """What a model card says of where the model comes from, as it was when the run began."""
    config, base, here = session.config, session.base, Path.cwd()
    paths = [source.path for source in train_sources(config.data)]
    # documents of pretraining are always local
    found = [hub_source(path, here) for path in paths] if config.recipe != "pretrain" else []
    return {
        "base_model": None if base is None else {"path": base.source, "commit": base.revision},
        "datasets": list(dict.fromkeys(source.name for source in found if source is not None)),
        "devices": {"name": device_name(session.world.device), "count": session.world.world_size},
    }


def _checkpoint_to_resume(session: Session) -> str | None:
    if isinstance(session.resume, int):
        return str(session.checkpoints.resolve(session.resume))
    newest = session.checkpoints.newest_intact()
    if newest is None:
        return None
    for step, problems in newest[2]:
        warn(f"the checkpoint of step {step} is damaged and passed over: {'; '.join(problems)}")
    return str(newest[1])


def _refuse_other_data(session: Session, state: TrainState, path: Path) -> None:
    changed = []
    if state.tokenizer_hash != session.store.manifest.tokenizer_hash:
        changed.append("the tokenizer")
    if state.data_hash != session.data_hash:
        changed.append("the training data")
    if state.base_hash != session.base_hash:
        changed.append("the model it starts from")
    if changed:
        raise DataError(
            f"{path} was trained with something else: {' and '.join(changed)} changed",
            "going on would not be the same training",
            "restore it, choose another run_dir, or say --allow-changes",
        )
    rows = state.samples_seen // max(state.step, 1)
    if rows != session.geometry.global_batch_size:
        raise ConfigError(
            f"{path} was trained with {rows} rows a step, not {session.geometry.global_batch_size}",
            "the order of the rows would change",
            f"set train.global_batch_size={rows}, or say --allow-changes",
        )
