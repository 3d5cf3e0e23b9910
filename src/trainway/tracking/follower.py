"""The training's side of a tracker that is fed by a process of its own: started, listened to, and ended in time."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from trainway.logs import stage, warn
from trainway.run_dir import RunDir
from trainway.tracking.target import Orders

TITLES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}
"""The trackers that are fed from metrics.jsonl, as people call them."""


class Follower:
    """A process that reads metrics.jsonl and feeds one tracker: nothing that a server does reaches the training."""

    def __init__(self, name: str, run: RunDir, orders: Orders) -> None:
        self._name, self._run = name, run
        self._complete = self._closing = False
        self._process = start_feed(run, name, orders)
        self._listener = threading.Thread(target=self._listen, name=f"tracking: {name}", daemon=True)
        self._listener.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Nothing: it reads what is in metrics.jsonl."""

    def sync(self) -> None:
        """Nothing: metrics.jsonl is what counts."""

    def tell(self, outcome: str) -> None:
        """Say how the run ended; what is left will be sent."""
        self._closing = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(f"{outcome}\n".encode())
            self._process.stdin.close()

    def close(self, seconds: float = 0.0) -> None:
        """Wait for the end of what `tell` began; what is missing after `seconds` is left to `trainway runs sync`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        end_feed(self._process)
        self._listener.join(1.0)
        if not self._complete:
            warn(
                f"{TITLES[self._name]} lacks a part of this run; complete it with: {sync_command(self._run, self._name)}"
            )

    def _listen(self) -> None:
        title = TITLES[self._name]
        for event in events(self._process):
            match event.get("say"):
                case "open":
                    stage("TRAIN", f"{title}: {event['where']}")
                case "lost":
                    warn(
                        f"{title} is lost: {event['why']}; training goes on, and it gets the rest when it is back"
                    )
                case "back":
                    warn(f"{title} is back")
                case "complete":
                    self._complete = True
        if not self._closing:
            warn(
                f"what feeds {title} has ended; training goes on, and after it: {sync_command(self._run, self._name)}"
            )


def sync_command(run: RunDir, tracker: str) -> str:
    """What completes the tracker, to be pasted into a shell."""
    return shlex.join(["trainway", "runs", "sync", str(run.path), "--to", tracker])


def close_all(followers: list[Follower], outcome: str, wait_s: float) -> None:
    """End them all within one time limit."""
    for follower in followers:
        follower.tell(outcome)
    end = time.monotonic() + wait_s
    for follower in followers:
        follower.close(end - time.monotonic())


def start_feed(run: RunDir, tracker: str, orders: Orders) -> subprocess.Popen[bytes]:
    """Start the process of `trainway.tracking.feed`, in a session of its own."""
    # -P: a directory or file named like a tracker, where the user happens to stand, is none
    command = [sys.executable, "-P", "-m", "trainway.tracking.feed", str(run.path.resolve()), tracker]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(orders.line().encode())
    process.stdin.flush()
    return process


def end_feed(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, if it has not ended."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)  # its own group: also what a library left behind
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def events(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What it says, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
