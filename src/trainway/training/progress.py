"""What a person sees while training runs: a bar on a terminal, tagged lines when the output is piped."""

from __future__ import annotations

import sys
from typing import Any

from trainway.logs import stage


class Progress:
    """Shows the step, loss, tokens/s, MFU and time left. Silent on ranks other than 0."""

    def __init__(self, total_steps: int, done_steps: int, every: int, *, is_main: bool) -> None:
        self._total, self._every, self._is_main = total_steps, every, is_main
        self._bar: Any = None
        if is_main and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, figures="")
            self._bar.start()

    def step(self, step: int, metrics: dict[str, Any], seconds_left: float) -> None:
        if not self._is_main:
            return
        figures = f"{metrics['label']}  " if "label" in metrics else ""
        figures += f"loss {metrics['train/loss']:.4f}  {metrics['perf/tokens_per_s']:,.0f} tok/s"
        if "perf/mfu" in metrics:
            figures += f"  MFU {metrics['perf/mfu']:.0%}"
        figures += f"  {clock(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step % self._every == 0 or step in (1, self._total):
            stage("TRAIN", f"step {step}/{self._total}  {figures}  norm {metrics['optim/grad_norm']:.3f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
