"""The boot of an experiment, from a volume to a trained model: stage after stage, each skipped when it is complete."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from trainway.config.knobs import Knobs
from trainway.config.load import load_config
from trainway.config.schema import RunConfig, TokenizerConfig
from trainway.data.turns import turn
from trainway.errors import ConfigError, ExitCode, Stopped, UserError
from trainway.launch.local import start_training
from trainway.logs import stage, start_logging, warn
from trainway.recipes import stages
from trainway.recipes.stages import Outcome, Progress, ShardRequest
from trainway.recipes.tokenizer import make_tokenizer
from trainway.recipes.volume import (
    ERASED,
    Volume,
    check_room,
    hub_environment,
    make_folders,
    text_size,
    token_environment,
)
from trainway.training.runs import run_status

FINEWEB = ("HuggingFaceFW/fineweb", "sample-10BT")
"""What RUN_SHARD=1 shards on a pod when no source is named: the sample of 10 billion tokens, which has an end."""
OURS = ("name", "run_dir", "runs_dir", "data.train", "data.validation", "data.store_dir")
"""Settings that follow from the experiment and the volume."""
GRACE_S = 10.0
"""How long an interrupted stage has to remove what it had half made, before the process ends all the same."""


@dataclass(frozen=True)
class Orchestration:
    """What one call of `trainway orchestrate` is asked to do."""

    knobs: Knobs
    overrides: tuple[str, ...] = ()
    """`key=value` words, over the preset or file that the knobs name."""
    inputs: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    reuse_shards: bool = False
    tokenizer_json: str | None = None
    format: str = "jsonl"
    gzip: bool = False
    train: bool = True
    notes: tuple[str, ...] = ()
    """What to say first: where variables come from."""


@dataclass
class Boot:
    """What was done, stage by stage."""

    experiment: str
    root: Path
    run_dir: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int = ExitCode.DONE

    def add(self, name: str, outcome: Outcome, began: float) -> None:
        """Note a stage and say it in one line."""
        self.stages.append({"stage": name, **asdict(outcome), "seconds": round(time.monotonic() - began, 3)})
        stage("TRAIN" if name == "train" else "DATA", f"{name}: {outcome.state}: {outcome.why}")


def orchestrate(request: Orchestration, progress: Progress | None = None) -> Boot:
    """Make directories, shards, tokenizer, configurations and token store, then train; what is complete is skipped.

    Several nodes of one run may call it at once on a shared volume: one prepares, the others wait for it.

    Raises:
        UserError: nothing that was made before is lost, or deleted.
        Stopped: SIGTERM or SIGINT came; the same call goes on at the same stage.
    """
    knobs = request.knobs
    config = _user_config(request)
    start_logging(config.log.level, is_main=True)
    for note in request.notes:
        stage("DATA", note)
    volume = Volume(Path(knobs.root).expanduser().absolute(), knobs.experiment)
    boot = Boot(knobs.experiment, volume.root, volume.run.path)
    shard_request = _shard_request(request)
    report = progress or (lambda label, done, total: None)
    started = time.time()
    with _stoppable(boot):
        began = time.monotonic()
        made = make_folders(volume)
        _set_environment(volume, knobs)
        boot.add("directories", Outcome("done" if made else "skipped", _made(volume, made)), began)
        with turn(volume.lock, report) as own:
            found = _prepared_by_another(volume, config) if own.finished_since(started) else None
            store = found or _prepare(request, shard_request, volume, config, boot, report)
            own.finish()
            began = time.monotonic()
            finished = stages.finished_training(volume, store)
        if finished is not None:
            boot.add("train", finished, began)
        elif request.train:
            words = [f"{key}={value}" for key, value in _places(volume).items()]
            boot.exit_code = start_training(volume.config("yaml"), words, progress=progress)
            if boot.exit_code == ExitCode.DONE:
                boot.add("train", Outcome("done", str(volume.run.path)), began)
    return boot


def _prepare(
    request: Orchestration,
    shard_request: ShardRequest,
    volume: Volume,
    config: RunConfig,
    boot: Boot,
    report: Progress,
) -> Path:
    """The stages that one process does for all nodes; where the token store is."""

    def timed(name: str, work: Callable[[], Outcome]) -> None:
        began = time.monotonic()
        boot.add(name, work(), began)

    if run_status(volume.run)["state"] != "done":
        check_room(
            volume,
            config,
            _text_bytes(request, shard_request, volume, config),
            shards=not shard_request.is_empty,
            checkpoints=request.train,
        )
    timed("shards", lambda: stages.shards(volume, shard_request, config.data, config.seed, report))
    given = request.tokenizer_json or config.tokenizer.path
    timed("tokenizer", lambda: make_tokenizer(volume, given, config, report))
    began = time.monotonic()
    outcome, run = stages.configs(volume, _run_config(volume, config))
    boot.add("configs", outcome, began)
    began = time.monotonic()
    outcome, store = stages.prepared(volume, run, report)
    boot.add("prepare", outcome, began)
    return store


def _prepared_by_another(volume: Volume, config: RunConfig) -> Path | None:
    """The token store that another node has made and verified while this one waited; None when it was asked for something else."""
    run = load_config(volume.config("yaml"), environ={}).config
    if stages.loaded(_run_config(volume, config)) != run:
        return None
    stage("DATA", f"another process has prepared {volume.experiment}: {volume.config('yaml')}")
    return stages.noted_store(volume)


def _user_config(request: Orchestration) -> RunConfig:
    """The preset or file with the user's words; the settings that we decide are refused among these."""
    # the knobs of the environment are read already: what they set here is a place on the volume
    loaded = load_config(request.knobs.config, list(request.overrides), environ={})
    for key in OURS:
        origin = loaded.origins[key]
        if origin == "command line":
            raise ConfigError(
                f"{key} follows from --root, --experiment and the input",
                "orchestrate decides where things are",
                f"leave {key} out, or use `trainway train` with it",
            )
        if key in loaded.explicit:
            warn(f"{origin}: {key} is replaced: it follows from --root, --experiment and the input")
    return loaded.config


def _shard_request(request: Orchestration) -> ShardRequest:
    knobs = request.knobs
    if request.inputs and request.dataset:
        raise ConfigError(
            "--input and --dataset are both given", "they are one source", "keep one of the two"
        )
    if request.subset and not request.dataset:
        raise ConfigError(
            "--subset is given without --dataset", "it names a part of a dataset", "add --dataset"
        )
    wanted = ShardRequest(
        inputs=request.inputs,
        validation=request.validation,
        dataset=request.dataset,
        subset=request.subset,
        lines=knobs.shard_lines,
        format="text" if request.format == "text" else "jsonl",
        gzip=request.gzip,
    )
    if request.format not in ("text", "jsonl"):
        raise ConfigError(f"--format is {request.format!r}", "it is text or jsonl", "e.g. --format jsonl")
    if request.reuse_shards:
        return ShardRequest()
    if wanted.is_empty and knobs.run_shard:
        if knobs.mode == "local":
            raise ConfigError(
                "RUN_SHARD is 1, and there is nothing to shard", "", "add --input FILE or --dataset ID"
            )
        return replace(wanted, dataset=FINEWEB[0], subset=FINEWEB[1])
    if wanted.is_empty and request.validation:
        raise ConfigError("--validation is given without --input", "", "add --input FILE or --dataset ID")
    return wanted


def _text_bytes(
    request: Orchestration, shard_request: ShardRequest, volume: Volume, config: RunConfig
) -> int:
    """About how much text there will be; 0 for a dataset on the Hub, whose size is not known here."""
    from trainway.data.sources import find_sources

    if shard_request.dataset is not None:
        return 0
    sources = []
    for setting, patterns in (("--input", shard_request.inputs), ("--validation", shard_request.validation)):
        if patterns and not stages.is_gone(patterns):
            sources += find_sources(patterns, config.data, setting=setting)
    if not sources:
        folders = (volume.train_shards, volume.val_shards)
        found = [item for folder in folders for item in stages.shard_files(folder, verify=False)]
        return sum(text_size(item.path, item.size) for item in found)
    return sum(text_size(source.path, source.size) for source in sources)


def _run_config(volume: Volume, config: RunConfig) -> RunConfig:
    """The user's configuration with everything where it is on the volume."""
    has_validation = bool(stages.shard_files(volume.val_shards, verify=False))
    if not has_validation:
        stage(
            "DATA", f"no validation shards: {config.data.val_ratio:g} of the training documents are held out"
        )
    places = _places(volume)
    data = config.data.model_copy(
        update={
            "train": (str(volume.train_shards),),
            "validation": (str(volume.val_shards),) if has_validation else (),
            "store_dir": places["data.store_dir"],
        }
    )
    return config.model_copy(
        update={
            "name": places["name"],
            "run_dir": places["run_dir"],
            "runs_dir": str(volume.run.path.parent),
            "data": data,
            "tokenizer": TokenizerConfig(path=str(volume.tokenizer)),
        }
    )


def _places(volume: Volume) -> dict[str, str]:
    """Settings that no knob of the environment may move."""
    return {"name": volume.experiment, "run_dir": str(volume.run.path), "data.store_dir": str(volume.cache)}


def _set_environment(volume: Volume, knobs: Knobs) -> None:
    """Keep the Hub's files on the volume, and hand its token to the libraries; before either is imported."""
    told, said = token_environment(os.environ)
    if knobs.mode == "cloud":
        places, notes = hub_environment(volume, os.environ)
        told, said = {**told, **places}, [*notes, *said]
        if "RUNPOD_POD_ID" in os.environ and any(volume.root.is_relative_to(path) for path in ERASED):
            warn(f"{volume.root} is erased when the pod stops: put --root on its volume")
    os.environ.update(told)
    for line in said:
        stage("DATA", line)


def _made(volume: Volume, made: int) -> str:
    where = f"{volume.experiment} on {volume.root}"
    return f"{made} made for {where}" if made else f"all there for {where}"


@contextmanager
def _stoppable(boot: Boot) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into Stopped in every stage; training, which saves first, handles them itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        for name in previous:
            signal.signal(name, signal.SIG_IGN)  # one is enough: what is half made is being removed
        asked.append(threading.Timer(GRACE_S, _leave, [boot]))
        asked[0].daemon = True
        asked[0].start()
        raise KeyboardInterrupt

    previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in previous:
            signal.signal(name, interrupt)
        yield
    except BaseException as error:
        # a library may have made something else of the interrupt
        if not (asked or isinstance(error, KeyboardInterrupt)) or isinstance(error, UserError | Stopped):
            raise
        raise _stopped(boot) from None
    finally:
        for timer in asked:
            timer.cancel()
        for name, handler in previous.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


def _stopped(boot: Boot) -> Stopped:
    done = ", ".join(item["stage"] for item in boot.stages) or "nothing"
    return Stopped(saved=f"{done} complete, nothing is lost")


def _leave(boot: Boot) -> None:
    # Learning the merges of a tokenizer takes minutes in which Python does not get to raise anything. As a kill
    # would, this leaves a temporary directory, which the next call removes.
    print(f"{_stopped(boot)}; run the same command again to go on", file=sys.stderr, flush=True)
    os._exit(ExitCode.STOPPED)
