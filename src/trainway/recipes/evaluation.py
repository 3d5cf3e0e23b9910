"""Evaluate runs, checkpoints and any causal language models: loss on held-out text, tasks, continued prompts."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainway.config.schema import EngineConfig, RunConfig
from trainway.data.batch import Batch
from trainway.data.loader import validation_batches
from trainway.data.store import TokenSplit, TokenStore
from trainway.data.turns import Progress
from trainway.engines import choose_precision
from trainway.engines.precision import Precision
from trainway.engines.world import World, open_world
from trainway.errors import ConfigError, EnvironmentFault
from trainway.files import atomic_write
from trainway.gad.student import StudentLoss
from trainway.logs import warn
from trainway.models.attention_choice import use_attention
from trainway.recipes.document_losses import DocumentLosses, difference, document_losses
from trainway.recipes.evaluation_data import (
    Counted,
    agreed_counting,
    settings_for,
    source_store,
    validation_parts,
    validation_store,
)
from trainway.recipes.evaluation_rows import fitting_rows
from trainway.recipes.evaluation_targets import EvaluatedModel, base_of, chosen_models, tokenizer_of
from trainway.recipes.lm_eval import Tasks, load_tasks, run_tasks
from trainway.release.generate import load_causal_lm
from trainway.run_dir import RunDir
from trainway.training.evaluate import chat_prompt, continue_prompts, text_prompt
from trainway.training.evaluations import VALIDATION, Evaluation, checkpoint_identity, keep_evaluation
from trainway.training.speed import device_name


@dataclass(frozen=True)
class Asked:
    """How every model of a call is evaluated."""

    data: tuple[str, ...] = ()
    """Files, directories or patterns; empty means the validation split of each run."""
    prompts: tuple[str, ...] = ()
    tasks: Tasks | None = None
    count: Counted = "auto"
    max_tokens: int | None = None
    """Read at most this many tokens, of each source; 0 reads all; None: as in training of a run's own split, else all."""
    seq_len: int | None = None
    """Tokens in a row; None means as trained, or 512 for a model without a run."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: as in training."""
    batch_rows: int | None = None
    """Rows that go through the model at once; None: as many as fit."""
    max_new_tokens: int = 64
    temperature: float = 0.0


def evaluate(target: str | Path, *, progress: Progress | None = None, **asked: Any) -> Evaluation:
    """Evaluate one model: a run (its best checkpoint), a checkpoint or a model directory; see `evaluate_models`."""
    return evaluate_models([target], Asked(**asked), progress=progress)[0]


def evaluate_models(
    targets: Sequence[str | Path],
    asked: Asked | None = None,
    *,
    which: Sequence[str | int] = (),
    out: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Evaluate models one after the other, each on the same, and keep what was found beside their runs.

    Args:
        targets: runs, checkpoints, or directories with a model or an adapter, whose base is found by its name.
        which: of each run these checkpoints: `best`, `latest`, `all`, or steps; empty means the best one.
        out: a file to write all of it to, as JSON.

    Raises:
        ConfigError: no model there, no such checkpoint, nothing to evaluate on, or an unknown task.
        DataError: the data or a checkpoint is missing or malformed.
        EnvironmentFault: lm-eval is not installed, a task's data cannot be reached, or one row does not fit in memory.
    """
    asked, progress = asked or Asked(), progress or (lambda what, done, total: None)
    if which and not any(RunDir(Path(target)).checkpoints.is_dir() for target in targets):
        raise ConfigError(
            f"--which chooses among a run's checkpoints, and {targets[0]} is no run",
            "there is no checkpoints directory in it",
            "leave --which out, or name the run directory",
        )
    models = [model for target in targets for model in chosen_models(target, which)]
    count = agreed_counting([model.config for model in models], asked.count, bool(asked.data))
    asked = replace(asked, count=count)
    for model in models:
        _check_purpose(model, asked)
    manager = load_tasks(asked.tasks) if asked.tasks else None
    found: list[Evaluation] = []
    with tempfile.TemporaryDirectory() as scratch, open_world(EngineConfig()) as world:
        bench = _Bench(asked, world, Path(scratch), progress, manager)
        for place, model in enumerate(models):
            bench.label = f"{place + 1}/{len(models)} {model.name}: " if len(models) > 1 else ""
            found.append(bench.measure(model))
        if world.is_main:
            for one in found:
                _keep(one)
            if out is not None:
                write_evaluations(found, out)
    return found


def write_evaluations(evaluations: Sequence[Evaluation], out: Path) -> None:
    """Write evaluations to a JSON file: {"models": [...]}, as `trainway eval --json` prints them."""
    import json

    text = json.dumps({"models": [one.to_json() for one in evaluations]}, indent=1, ensure_ascii=False)
    atomic_write(out, text + "\n")


def _check_purpose(model: EvaluatedModel, asked: Asked) -> None:
    if model.config is None and not (asked.data or asked.tasks or asked.prompts):
        raise ConfigError(
            f"there is nothing to evaluate {model.name} on",
            "it is not of a run, so it has no validation split of its own",
            "name a file: --data FILE, or tasks: --tasks NAME,NAME",
        )


@dataclass
class _Bench:
    """What the models of one call share: stores that are tokenised once, and the first one's losses."""

    asked: Asked
    world: World
    scratch: Path
    progress: Progress
    manager: Any
    """lm-eval's, with the tasks asked for; None without any."""
    label: str = ""
    stores: dict[tuple[str, ...], TokenStore] = field(default_factory=dict)
    parts: dict[Path, list[tuple[str, int]]] = field(default_factory=dict)
    """Of each run's store the files of its validation split."""
    first: DocumentLosses | None = None

    def measure(self, target: EvaluatedModel) -> Evaluation:
        asked, device = self.asked, self.world.device
        model, tokenizer = load_causal_lm(target.directory)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        count = asked.count if asked.data else "auto"
        settings = settings_for(target.config, count, asked.seq_len, int(longest))
        packed = settings.data.packing != "none"
        attention = use_attention(model, settings.model.attention, packed=packed, device=device)
        model.to(device)
        wanted = settings.train.precision if asked.precision == "auto" else asked.precision
        precision = choose_precision(wanted, device)
        chunk = settings.train.loss_chunk_tokens
        module = StudentLoss(model, chunk_tokens=chunk)
        rows = asked.batch_rows or fitting_rows(model, settings.train.seq_len, chunk, device)
        losses: dict[str, DocumentLosses] = {}
        if asked.data or (target.config is not None and not asked.tasks):
            losses, rows = self._losses(target, module, settings, precision, rows)
        how = {
            "recipe": settings.recipe,
            "counted": "text" if settings.recipe == "pretrain" else settings.data.train_on,
            "seq_len": settings.train.seq_len,
            "packing": settings.data.packing,
            "rows": rows,
            "attention": attention,
            "precision": precision,
            "weights": str(model.dtype).removeprefix("torch."),
            "device": device_name(device),
            "asked": _in_words(asked),
            **base_of(target.directory),
        }
        found = self._evaluation(target, losses, how)
        found = replace(found, samples=self._samples(module, tokenizer, settings))
        if asked.tasks is not None:
            found = self._with_tasks(found, model, tokenizer, precision, rows)
        del model, module
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _evaluation(
        self, target: EvaluatedModel, losses: dict[str, DocumentLosses], how: dict[str, Any]
    ) -> Evaluation:
        whole = DocumentLosses.joined(losses.values()) if losses else None
        return Evaluation(
            model=target.name,
            run=None if target.run is None else str(target.run.path),
            step=target.step,
            checkpoint=None if target.run is None else checkpoint_identity(target.directory.parent),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            data=() if whole is None else self.asked.data or (VALIDATION,),
            figures={} if whole is None else whole.figures(),
            sources={name: one.figures() for name, one in losses.items()} if len(losses) > 1 else {},
            difference=self._difference(whole),
            settings=how,
        )

    def _losses(
        self,
        target: EvaluatedModel,
        module: StudentLoss,
        settings: RunConfig,
        precision: Precision,
        rows: int,
    ) -> tuple[dict[str, DocumentLosses], int]:
        """By source, and the rows that fitted."""
        asked, found = self.asked, {}
        if asked.data:
            max_tokens = asked.max_tokens or None
            for source in asked.data:
                store = self._store(settings, source, target.directory)
                found[source], rows = self._split(module, store, settings, precision, rows, max_tokens)
            return found, rows
        assert target.config is not None
        store = validation_store(target.config, target.directory, self._prepared)
        max_tokens = asked.max_tokens if asked.max_tokens is not None else target.config.eval.max_tokens
        if target.config.recipe == "gad" and asked.max_tokens is None:
            max_tokens = None  # its validation is counted in prompts
        losses, rows = self._split(module, store, settings, precision, rows, max_tokens or None)
        if store.path not in self.parts:
            scratch = self.scratch / f"parts-{len(self.parts)}"
            self.parts[store.path] = validation_parts(target.config, store, scratch, self._prepared)
        start = 0
        for name, documents in self.parts[store.path] or [(VALIDATION, len(losses.tokens))]:
            found[name] = losses.part(start, start + documents)
            start += documents
        return found, rows

    def _store(self, settings: RunConfig, source: str, directory: Path) -> TokenStore:
        """The source in the tokens of this model; made once for all models of the same tokenizer and settings."""
        home, tokenizer = tokenizer_of(directory)
        key = (
            source,
            settings.recipe,
            str(settings.train.seq_len),
            settings.data.model_dump_json(),
            tokenizer,
        )
        if key not in self.stores:
            if not Path(settings.data.store_dir).is_dir():
                changed = settings.data.model_copy(update={"store_dir": str(self.scratch)})
                settings = settings.model_copy(update={"data": changed})
            out = self.scratch / f"source-{len(self.stores)}"
            self.stores[key] = source_store(settings, source, home, out, self._prepared).store
        return self.stores[key]

    def _split(
        self,
        module: StudentLoss,
        store: TokenStore,
        settings: RunConfig,
        precision: Precision,
        rows: int,
        max_tokens: int | None,
    ) -> tuple[DocumentLosses, int]:
        """The losses, and the rows that fitted: half as many whenever memory runs out."""
        split, world = store.split("val"), self.world
        total = min(split.num_tokens, max_tokens or split.num_tokens) // world.world_size

        def batches(wanted: TokenSplit) -> Iterator[Batch]:
            return validation_batches(
                wanted,
                seq_len=settings.train.seq_len,
                micro_batch_size=rows,
                packing=settings.data.packing,
                max_tokens=max_tokens,
                rank=world.rank,
                world_size=world.world_size,
            )

        while True:
            try:
                losses = document_losses(
                    module,
                    split,
                    batches,
                    store.token_bytes,
                    world,
                    precision,
                    lambda done: self.progress(f"{self.label}evaluating", min(done, total), total),
                )
                self.progress(f"{self.label}evaluating", total, total)
                return losses, rows
            except torch.OutOfMemoryError as error:
                if rows == 1 or world.world_size > 1:  # ranks would part ways
                    raise _no_room(rows, settings) from error
            rows //= 2
            torch.cuda.empty_cache()

    def _difference(self, losses: DocumentLosses | None) -> dict[str, float | None]:
        if losses is None or not self.asked.data:
            return {}
        if self.first is None:
            self.first = losses
            return {}
        return difference(losses, self.first)

    def _samples(
        self, module: StudentLoss, tokenizer: PreTrainedTokenizerBase, settings: RunConfig
    ) -> list[dict[str, str]]:
        as_prompt = text_prompt if settings.recipe == "pretrain" else chat_prompt
        found = continue_prompts(
            module,
            tokenizer,
            [as_prompt(tokenizer, prompt) for prompt in self.asked.prompts],
            max_new_tokens=self.asked.max_new_tokens,
            temperature=self.asked.temperature,
            seed=settings.seed,
        )
        samples = []
        for sample in found:
            samples.append(sample)
            self.progress(f"{self.label}prompts", len(samples), len(self.asked.prompts))
        return samples

    def _with_tasks(
        self,
        found: Evaluation,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: Precision,
        rows: int,
    ) -> Evaluation:
        assert self.asked.tasks is not None
        tasks, versions = run_tasks(
            model, tokenizer, self.asked.tasks, self.manager, precision=precision, batch_size=rows
        )
        return replace(found, tasks=tasks, settings={**found.settings, **versions})

    def _prepared(self, what: str, done: int, total: int) -> None:
        self.progress(f"{self.label}{what}", done, total)


def _no_room(rows: int, settings: RunConfig) -> EnvironmentFault:
    return EnvironmentFault(
        f"the GPU's memory is full with {rows} row{'s' * (rows > 1)} of {settings.train.seq_len} tokens",
        "weights are held in fp32, 4 bytes a parameter",
        "lower --batch-rows or --seq-len, or use a GPU with more memory",
    )


def _keep(evaluation: Evaluation) -> None:
    try:
        keep_evaluation(evaluation)
    except (OSError, EnvironmentFault) as error:
        warn(f"the evaluation is not kept beside the run: {str(error).splitlines()[0]}")


def _in_words(asked: Asked) -> dict[str, Any]:
    """What was asked for, as far as it changes the result."""
    tasks = asked.tasks and {
        "limit": asked.tasks.limit,
        "num_fewshot": asked.tasks.num_fewshot,
    }
    return {
        "max_tokens": asked.max_tokens,
        "seq_len": asked.seq_len,
        "precision": asked.precision,
        "count": asked.count,
        "prompts": len(asked.prompts),
        "tasks": tasks,
    }
