"""The main job on a corpus that every machine has: the Python standard library, pretrained on, then tuned on."""

from __future__ import annotations

import ast
import json
import math
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainway.config.load import load_config
from trainway.files import atomic_write
from trainway.logs import stage, start_logging
from trainway.recipes.pretrain import pretrain
from trainway.recipes.sft import sft
from trainway.release.bundle import export
from trainway.release.generate import generate_text
from trainway.report.chart import draw_losses
from trainway.report.page import write_report
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl
from trainway.training.session import RunResult

PRESET, TUNING_PRESET = "quickstart", "quickstart_tune"
TUNING = "tune."
"""Settings that begin with this are the tuning's, without it."""
PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "    try:\n        return int(",
)
QUESTION = "\n\n# What it does:"
"""Stands between a function and the sentence that the tuned model writes about it."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_HELD_OUT_EVERY = 20
_LONGEST_PAIR = 700  # characters, so that nearly all fit into 256 tokens

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Explained:
    """A function that no stage was trained on, and what is said about it."""

    function: str
    before: str
    after: str
    docstring: str


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and what was learnt."""

    out: Path
    model_dir: Path
    tuned_dir: Path
    chart: Path
    report: Path
    """The pretraining as a page; the tuning has one in its run directory."""
    start_loss: float
    val_loss: float
    tuned_from: float
    tuned_to: float
    seconds: float
    samples: tuple[str, ...]
    explained: tuple[Explained, ...]


def quickstart(
    out: str | Path, overrides: Sequence[str] = (), progress: Report | None = None
) -> QuickstartResult:
    """Pretrain a small code model on the standard library, then teach it to say what a function does.

    Run again after an interruption, it goes on. `overrides`: settings of the pretraining; with `tune.` before them,
    of the tuning.

    Raises:
        Stopped: interrupted, with a checkpoint saved.
    """
    out = Path(out)
    start_logging("info", is_main=True)
    corpus, held_out = write_corpus(out / "data")
    own = [word for word in overrides if not word.startswith(TUNING)]
    places = _places(out, corpus, held_out, "run")
    loaded = load_config(PRESET, [*places, *own])
    pretrained = pretrain(loaded.config, progress=progress, origins=loaded.origins)
    model_dir = _exported(pretrained, out / "model")
    chart = draw_losses(RunDir(pretrained.run_dir), out / "loss.png")
    samples = tuple(prompt + generate_text(model_dir, prompt, max_new_tokens=48) for prompt in PROMPTS)

    pairs, held_pairs = (
        write_pairs(path, path.with_name(f"pairs-{path.name}")) for path in (corpus, held_out)
    )
    own = [word.removeprefix(TUNING) for word in overrides if word.startswith(TUNING)]
    places = [*_places(out, pairs, held_pairs, "tuning"), f"model.path={model_dir}"]
    loaded = load_config(TUNING_PRESET, [*places, *own])
    tuned = sft(loaded.config, progress=progress, origins=loaded.origins)
    tuned_dir = _exported(tuned, out / "tuned-model")

    losses, tuned_losses = _val_losses(pretrained), _val_losses(tuned)
    return QuickstartResult(
        out=out,
        model_dir=model_dir,
        tuned_dir=tuned_dir,
        chart=chart,
        report=write_report([pretrained.run_dir]).path,
        start_loss=losses[0],
        val_loss=losses[-1],
        tuned_from=tuned_losses[0],
        tuned_to=tuned_losses[-1],
        seconds=pretrained.report["seconds"] + tuned.report["seconds"],
        samples=samples,
        explained=_explained(tuned),
    )


def write_corpus(directory: Path) -> tuple[Path, Path]:
    """Write every module of the standard library as one JSON record (`path`, `text`); tests are left out.

    Every twentieth module is held out, in a file of its own. Files that exist are complete and are kept.
    """
    paths = directory / "stdlib.jsonl", directory / "held-out.jsonl"
    if not all(path.exists() for path in paths):
        directory.mkdir(parents=True, exist_ok=True)
        modules = list(_modules())
        held_out = modules[::_HELD_OUT_EVERY]
        stage("DATA", f"{len(modules):,} modules of the Python standard library → {directory}")
        del modules[::_HELD_OUT_EVERY]
        for path, rows in zip(paths, (modules, held_out), strict=True):
            _write_rows(path, rows)
    return paths


def write_pairs(modules: Path, path: Path) -> Path:
    """Write (function without its docstring → the docstring's first paragraph) for the functions of `modules`."""
    if not path.exists():
        texts = [json.loads(line)["text"] for line in modules.read_text(encoding="utf-8").splitlines()]
        pairs = [pair for text in texts for pair in _pairs(text)]
        stage("DATA", f"{len(pairs):,} functions with a docstring → {path}")
        _write_rows(path, [{"prompt": a + QUESTION, "completion": f" {b}"} for a, b in pairs])
    return path


def _places(out: Path, train: Path, validation: Path, run: str) -> list[str]:
    return [
        f"data.train={json.dumps([str(train)])}",
        f"data.validation={json.dumps([str(validation)])}",
        f"data.store_dir={out / 'cache'}",
        f"run_dir={out / run}",
    ]


def _exported(result: RunResult, model_dir: Path) -> Path:
    return model_dir if model_dir.exists() else export(result.run_dir, model_dir)


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _modules() -> Iterator[dict[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for source in sorted(root.rglob("*.py")):
        relative = source.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts):
            continue
        try:
            text = source.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few fixtures are broken on purpose
        if text.strip() and "\0" not in text:
            yield {"path": relative.as_posix(), "text": text}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, statement = ast.get_docstring(node), node.body[0]
        if not docstring or statement.lineno == node.lineno:
            continue
        kept = lines[node.lineno - 1 : statement.lineno - 1] + lines[statement.end_lineno : node.end_lineno]
        function, sentence = textwrap.dedent("\n".join(kept)), " ".join(docstring.split("\n\n")[0].split())
        if len(function) + len(sentence) <= _LONGEST_PAIR:
            yield function, sentence


def _val_losses(result: RunResult) -> list[float]:
    records = read_jsonl(RunDir(result.run_dir).metrics)
    return [record["val/loss"] for record in records if "val/loss" in record] or [math.nan]


def _explained(result: RunResult) -> tuple[Explained, ...]:
    samples = list(read_jsonl(RunDir(result.run_dir).samples))
    before = {sample["prompt"]: sample["text"] for sample in samples if sample["step"] == 0}
    return tuple(
        Explained(
            sample["prompt"].removesuffix(QUESTION),
            before[sample["prompt"]],
            sample["text"],
            sample["reference"],
        )
        for sample in samples
        if sample["step"] == result.step and not sample.get("best")
    )
