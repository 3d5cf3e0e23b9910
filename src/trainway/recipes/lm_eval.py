"""lm-evaluation-harness: its tasks, run on a model that is loaded already."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainway.data.tokenise import has_bos
from trainway.engines.precision import Precision, autocast
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.attention_choice import plain_attention

PACKAGE = "lm-eval"
MOST_ROWS = 64
LISTED = 6
_BROKEN = (AttributeError, AssertionError, KeyError, TypeError, NotImplementedError)
"""What a task's own definition raises; whatever else happens while one is loaded is its data's fault."""


@dataclass(frozen=True)
class Tasks:
    """What lm-evaluation-harness is asked for."""

    names: tuple[str, ...]
    limit: int | None = None
    """Examples of each task; None takes all."""
    num_fewshot: int | None = None
    """Worked examples in each prompt; None means the task's own number."""
    include_path: Path | None = None
    """A directory of task definitions of one's own."""


def load_tasks(tasks: Tasks) -> Any:
    """lm-eval's task manager, when every task is known and its data is here; before any model is loaded.

    Raises:
        ConfigError: there is no such task, or its definition is broken.
        EnvironmentFault: lm-eval is not installed, or the data of a task cannot be reached; all such tasks are named.
    """
    manager = _manager(tasks)
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks.names if name not in known]:
        raise _unknown(unknown, known)
    unreachable: dict[str, str] = {}
    for name in tasks.names:
        try:
            manager.load([name])
        except _BROKEN as error:
            raise ConfigError(
                f"the task {name} cannot be loaded",
                f"{type(error).__name__}: {_first_line(error)}",
                "correct its definition",
            ) from error
        except Exception as error:
            unreachable[name] = f"{type(error).__name__}: {_first_line(error)}"
    if unreachable:
        raise _unreachable(unreachable)
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    manager: Any,
    *,
    precision: Precision,
    batch_size: int,
) -> tuple[dict[str, dict[str, float | None]], dict[str, Any]]:
    """Run tasks on a model where it lies; `manager`: of `load_tasks`. lm-eval shows its own progress.

    Returns:
        Of each task and group its metrics by name (a filter other than the task's first one in brackets), each with its
        standard error as NAME_stderr, and num_samples; and lm_eval and task_versions, for the record.
    """
    evaluator = import_module("lm_eval.evaluator")
    huggingface = import_module("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model.eval()
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(model))  # its rows are padded, and it generates
    try:
        with torch.no_grad(), autocast(precision, model.device), _texts_begin_with_bos(tokenizer):
            found = evaluator.simple_evaluate(
                model=huggingface.HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    backend="causal",
                    batch_size=min(batch_size, MOST_ROWS),
                ),
                tasks=list(tasks.names),
                limit=tasks.limit,
                num_fewshot=tasks.num_fewshot,
                task_manager=manager,
                log_samples=False,
            )
    finally:
        model.set_attn_implementation(before)
    samples = found.get("n-samples", {})
    results = {
        name: _metrics(metrics, samples.get(name, {}).get("effective"))
        for name, metrics in found["results"].items()
    }
    return results, {"lm_eval": version(PACKAGE), "task_versions": dict(found.get("versions", {}))}


def _manager(tasks: Tasks) -> Any:
    path = tasks.include_path
    if path is not None and not path.is_dir():
        raise ConfigError(
            f"--include-path {path} is no directory",
            "it holds the definitions of tasks, one YAML file each",
            "correct the path",
        )
    try:
        manager = import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise EnvironmentFault(
            "tasks need the package lm-eval",
            "it is not installed" if error.name == "lm_eval" else f"it cannot be imported: {error}",
            "pip install 'trainway[eval]'",
        ) from error
    if path is None:
        return manager()
    # thousands of shipped definitions take half a minute to read: not where all that is asked for is one's own
    own = manager(include_path=str(path), include_defaults=False)
    return own if set(tasks.names) <= set(own.all_subtasks) else manager(include_path=str(path))


@contextmanager
def _texts_begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """As documents do in training, where the tokenizer has a token for it, whether or not it puts it there itself."""
    bos, backend = tokenizer.bos_token, tokenizer.backend_tokenizer
    if not has_bos(tokenizer) or tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        yield
        return
    before = backend.post_processor
    special = [(bos, tokenizer.bos_token_id)]
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    try:
        yield
    finally:
        backend.post_processor = before


def _metrics(found: dict[str, Any], samples: int | None) -> dict[str, float | None]:
    """`acc,none` → acc, `exact_match_stderr,strict-match` → exact_match[strict-match]_stderr."""
    metrics: dict[str, float | None] = {}
    for key, value in found.items():
        name, comma, rule = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue  # alias, and N/A where there is no standard error
        error = name.endswith("_stderr")
        name = name.removesuffix("_stderr") + ("" if rule == "none" else f"[{rule}]")
        metrics[f"{name}_stderr" if error else name] = float(value)
    if samples is not None:
        metrics["num_samples"] = samples
    return metrics


def _unknown(names: Sequence[str], known: set[str]) -> ConfigError:
    near = get_close_matches(names[0], known, n=3)
    return ConfigError(
        f"there is no task {', '.join(names)}",
        f"lm-eval {version(PACKAGE)} knows {len(known):,} tasks, none of that name",
        f"did you mean {' or '.join(near)}?"
        if near
        else "name the directory that defines it: --include-path DIR",
    )


def _unreachable(found: dict[str, str]) -> EnvironmentFault:
    listed = [f"{name}: {why}" for name, why in list(found.items())[:LISTED]]
    if len(found) > LISTED:
        listed.append(f"and {len(found) - LISTED} more")
    return EnvironmentFault(
        f"the data of {len(found)} task{'s' * (len(found) > 1)} cannot be reached: {', '.join(found)}",
        "; ".join(listed),
        "go online once, so that it is kept in HF_HOME, or bring tasks of your own: --include-path DIR",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
