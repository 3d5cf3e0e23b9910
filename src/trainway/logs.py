"""The log: stage tags, one line a message, to the terminal and to the run's log file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

logger = logging.getLogger("trainway")

STAGES = (
    "STEP",
    "DDP",
    "DATA",
    "MODEL",
    "TRAIN",
    "EVAL",
    "EPOCH",
    "STAGE",
    "SAVE",
    "RESULT",
    "DONE",
    "RELEASE",
    "COLLATE",
    "BATCH",
)


def stage(tag: str, message: str, *, level: int = logging.INFO) -> None:
    """Log one line under a stage tag, such as `[DATA] 1,204 documents`."""
    assert tag in STAGES, tag
    logger.log(level, "[%s] %s", tag, message)


def warn(message: str) -> None:
    """Log a warning: something the user should know, though the run goes on."""
    logger.warning("warning: %s", message)


def start_logging(level: str, *, is_main: bool) -> None:
    """Send the log to the terminal: rank 0's lines only; the other ranks speak from warnings up."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(level.upper() if is_main else "WARNING")
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)


def log_to_file(path: Path) -> None:
    """Append the log to a file too, each line with its time in UTC."""
    handler = logging.FileHandler(path, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger.addHandler(handler)


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at that moment: a progress bar takes its place, to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
