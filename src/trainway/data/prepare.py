"""From sources to a token store: reads, checks, splits and tokenises documents, once for the same content."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, overload

from trainway.config.schema import RunConfig
from trainway.data.building import (
    Job,
    check_documents,
    clear_stale,
    finish_store,
    open_writer,
    settle,
    write_documents,
    write_tokenizer,
)
from trainway.data.parts import PreparedPart, all_made, merge_job, prepare_part
from trainway.data.prepared import PreparedData, open_prepared
from trainway.data.store import TOKENIZER_DIR
from trainway.data.turns import Progress, turn
from trainway.errors import ConfigError
from trainway.files import atomic_directory

__all__ = ["PreparedData", "PreparedPart", "Progress", "merge_parts", "prepare"]


@overload
def prepare(
    config: RunConfig,
    *,
    progress: Progress | None = ...,
    root: Path | None = ...,
    tokenizer_dir: Path | None = ...,
) -> PreparedData: ...
@overload
def prepare(
    config: RunConfig,
    *,
    num_workers: int,
    worker_index: int | Literal["auto"],
    progress: Progress | None = ...,
    root: Path | None = ...,
    tokenizer_dir: Path | None = ...,
) -> PreparedPart: ...
def prepare(
    config: RunConfig,
    *,
    num_workers: int | None = None,
    worker_index: int | Literal["auto"] | None = None,
    progress: Progress | None = None,
    root: Path | None = None,
    tokenizer_dir: Path | None = None,
) -> PreparedData | PreparedPart:
    """Make the token store of `config.data`, or find the one made before from the same content; verify it.

    Relative paths are below `root` (the working directory). Safe to call from several processes at once.
    For recipes sft and gad the store holds conversations with their targets, for gad prompts with the teacher's
    answers, in the tokens of tokenizer.path, else of `tokenizer_dir`, else of model.path, which is downloaded if it
    is not here.
    With `num_workers` only the part of worker `worker_index` (from 0; `auto`: JOB_COMPLETION_INDEX) is made, and
    merge_parts makes the store of all parts.
    Raises DataError for missing, altered or malformed data (only the list of bad records is kept then),
    ConfigError for settings that contradict each other, EnvironmentFault when the disk is full or read-only.
    """
    return _prepare(config, num_workers, worker_index, progress, root, tokenizer_dir)


def _prepare(
    config: RunConfig,
    num_workers: int | None,
    worker_index: int | Literal["auto"] | None,
    progress: Progress | None,
    root: Path | None,
    tokenizer_dir: Path | None,
    merge: bool = False,
) -> PreparedData | PreparedPart:
    """merge: join the parts when this one was the last that was missing."""
    began = time.time()
    if (num_workers is None) != (worker_index is None):
        raise ConfigError(
            "a worker needs both its index and the number of workers",
            "one of num_workers and worker_index is not given",
            "e.g. --num-workers 4 --worker-index 0",
        )
    job = settle(config, root or Path.cwd(), progress or _silent, began, tokenizer_dir)
    if num_workers is not None and worker_index is not None:
        part = prepare_part(job, num_workers, worker_index)
        return _merge(job, num_workers) if merge and all_made(job, num_workers) else part
    with turn(lock_path(job), job.report) as own:
        cached = job.store_dir.exists()
        if not cached:
            clear_stale(job.store_dir)
            with atomic_directory(job.store_dir) as temp:
                _build(job, temp)
        return open_prepared(job, own, cached)


def merge_parts(
    config: RunConfig,
    num_workers: int,
    *,
    progress: Progress | None = None,
    root: Path | None = None,
    tokenizer_dir: Path | None = None,
) -> PreparedData:
    """Make the token store of the parts that `num_workers` workers prepared: byte for byte what prepare makes.

    Every file of every part is verified, and the parts are removed when the store is on the disk.
    Raises DataError naming the part that is missing, damaged or made from other data or settings.
    """
    began = time.time()
    return _merge(settle(config, root or Path.cwd(), progress or _silent, began, tokenizer_dir), num_workers)


def prepare_as_asked(
    config: RunConfig,
    *,
    num_workers: int | None,
    worker_index: str | None,
    merge: bool,
    progress: Progress | None = None,
    tokenizer_dir: Path | None = None,
) -> PreparedData | PreparedPart:
    """prepare or merge_parts, as the options of the command line say.

    With an index and `merge` the worker that finishes last joins the parts: nobody has to wait for the others.
    Raises ConfigError for options that do not go together.
    """
    if merge and num_workers is None:
        raise ConfigError(
            "--merge joins the parts of all workers",
            "--num-workers is not given",
            "e.g. --num-workers 4 --merge",
        )
    if merge and num_workers is not None and worker_index is None:
        return merge_parts(config, num_workers, progress=progress, tokenizer_dir=tokenizer_dir)
    if worker_index is not None and worker_index != "auto" and not worker_index.isdecimal():
        raise ConfigError(
            f"--worker-index is {worker_index!r}", "it is auto or a number from 0", "e.g. --worker-index 0"
        )
    index: int | Literal["auto"] | None = "auto"
    if worker_index != "auto":
        index = None if worker_index is None else int(worker_index)
    return _prepare(config, num_workers, index, progress, None, tokenizer_dir, merge)


def lock_path(job: Job) -> Path:
    """The file that whoever makes or verifies the store holds the lock of."""
    return job.store_dir.with_name(f"{job.store_dir.name}.lock")


def _merge(job: Job, num_workers: int) -> PreparedData:
    with turn(lock_path(job), job.report) as own:
        cached = job.store_dir.exists()
        if not cached:
            clear_stale(job.store_dir)
            merge_job(job, num_workers)
        return open_prepared(job, own, cached)


def _build(job: Job, out: Path) -> None:
    tokenizer = write_tokenizer(job, out / TOKENIZER_DIR)
    with open_writer(job, out, tokenizer) as writer:
        left_out = write_documents(job, job.inputs.files, tokenizer, writer)
        check_documents(job, writer)
        finish_store(job, writer, tokenizer, job.inputs.files, left_out)


def _silent(label: str, done: int, total: int) -> None:
    pass
