"""The main job on a corpus that every machine has: the Python standard library, from its files to a loaded model."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainway.config.load import load_config
from trainway.files import atomic_write
from trainway.logs import stage, start_logging
from trainway.recipes.pretrain import pretrain
from trainway.release.bundle import export
from trainway.release.generate import generate_text
from trainway.report.chart import draw_losses
from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl
from trainway.training.session import RunResult

PRESET = "quickstart"
PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "    try:\n        return int(",
)

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and what was learnt."""

    out: Path
    model_dir: Path
    chart: Path
    start_loss: float
    val_loss: float
    seconds: float
    samples: tuple[str, ...]


def quickstart(
    out: str | Path, overrides: tuple[str, ...] = (), progress: Callable[[str, int, int], None] | None = None
) -> QuickstartResult:
    """Pretrain a small code model on the standard library; run again after an interruption, it goes on.

    Raises:
        Stopped: interrupted, with a checkpoint saved.
    """
    out = Path(out)
    start_logging("info", is_main=True)
    corpus = write_corpus(out / "data" / "stdlib.jsonl")
    places = [
        f"data.train={json.dumps([str(corpus)])}",
        f"data.store_dir={out / 'cache'}",
        f"run_dir={out / 'run'}",
    ]
    config = load_config(PRESET, [*places, *overrides]).config
    result = pretrain(config, progress=progress)
    model_dir = out / "model"
    if not model_dir.exists():
        export(result.run_dir, model_dir)
    chart = draw_losses(RunDir(result.run_dir), out / "loss.png")
    samples = tuple(prompt + generate_text(model_dir, prompt, max_new_tokens=48) for prompt in PROMPTS)
    return _summary(out, model_dir, chart, result, samples)


def write_corpus(path: Path) -> Path:
    """Write every module of the standard library as one JSON record (`path`, `text`); tests are left out.

    A file that exists is complete and is kept.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [json.dumps(record, ensure_ascii=False) for record in _modules()]
        stage("DATA", f"{len(records):,} modules of the Python standard library → {path}")
        atomic_write(path, "".join(record + "\n" for record in records))
    return path


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


def _summary(
    out: Path, model_dir: Path, chart: Path, result: RunResult, samples: tuple[str, ...]
) -> QuickstartResult:
    losses = [r["val/loss"] for r in read_jsonl(RunDir(result.run_dir).metrics) if "val/loss" in r]
    start, end = losses[0], result.val_loss if result.val_loss is not None else math.nan
    return QuickstartResult(out, model_dir, chart, start, end, result.report["seconds"], samples)
