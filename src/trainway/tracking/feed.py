"""The process that brings a tracker what metrics.jsonl holds: `python -m trainway.tracking.feed RUN TRACKER`.

It is told on standard input: one JSON line of `Orders` first, later one word, how the run ended; an end of file without
one says that the training was killed. It says on standard output, a JSON line each: {"say": "open", "where"},
{"say": "sent", "step"}, {"say": "lost", "why"}, {"say": "back"}, {"say": "busy"}, {"say": "complete"}.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainway.errors import error_chain
from trainway.run_dir import RunDir
from trainway.tracking.tail import Tail, last_step
from trainway.tracking.target import Orders, Row, Service, Target, clean

POLL_S = 1.0
"""Between two looks at metrics.jsonl."""
ROWS = 200
"""Steps that are sent at once."""
FIRST_PAUSE_S, LONGEST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0, 2.0
"""Between attempts at a tracker that is lost: at first, at most, and when the run waits for it."""
LONGEST_WHY = 300
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
"""No telemetry, no prompt, and no hand on the devices of the training."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Unless the user says otherwise: this process tries again by itself."""


class Feeder:
    """Keeps one tracker up to date, and says when it is lost and when it is back."""

    def __init__(self, run: RunDir, tracker: str, orders: Orders) -> None:
        self._run, self._tracker, self._orders = run, tracker, orders
        self._service: Service | None = None
        self._tail = Tail(run.metrics)

    def bring(self, *, whole: bool) -> None:
        """Send what the tracker lacks. whole: the last step too, which another record may yet belong to."""
        if self._service is None:
            self._service = self._open()
            self._tail.close()
            self._tail = Tail(self._run.metrics)
            say("open", where=clean(self._service.where, os.environ))
        while rows := self._tail.rows(ROWS):
            self._send(rows)
        if whole:
            self._send(self._tail.last())

    def close(self, outcome: str) -> None:
        assert self._service is not None
        self._service.close(outcome)

    def lose(self) -> None:
        """What a failed tracker holds is asked for anew."""
        self._service = None

    def _open(self) -> Service:
        orders, once = self._orders, self._orders.once
        over = once and orders.outcome != "running"
        finished = last_step(self._run.metrics) if over else None
        target = Target.read(self._run, self._tracker, os.environ, finished)
        service = open_service(target)
        known = target.recall().get("settings")
        if not once and known not in (None, orders.settings) and service.last_step >= orders.first_step:
            # it shows a future that will not be: from a step before, the run goes on with other settings
            service.close("stopped")
            target.forget()
            service = open_service(target)
        if not once:
            target.remember(settings=orders.settings)
        return service

    def _send(self, rows: list[Row]) -> None:
        assert self._service is not None
        fresh = []
        for row in rows:
            lacking = {
                clean(name, os.environ): value
                for name, value in row.numbers.items()
                if not self._service.has(name, row.step)
            }
            if lacking:
                fresh.append(Row(row.step, row.seconds, lacking))
        if fresh:
            self._service.send(fresh)
            say("sent", step=fresh[-1].step)


def open_service(target: Target) -> Service:
    """Import the tracker's library and open the run there."""
    match target.tracker:
        case "wandb":
            from trainway.tracking.wandb import WandbTracker

            return WandbTracker(target)
        case "mlflow":
            from trainway.tracking.mlflow import MlflowTracker

            return MlflowTracker(target)
        case _:
            from trainway.tracking.trackio import TrackioTracker

            return TrackioTracker(target)


class End:
    """How the training ended, as soon as it has."""

    def __init__(self, wait_s: float) -> None:
        self.outcome: str | None = None
        self.whole = False
        self._wait_s = wait_s
        self._event = threading.Event()
        self._training = os.getppid()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)
        if os.getppid() != self._training and not self._event.is_set():
            self._ended("")  # killed, and a process that it forked keeps our standard input open

    def _listen(self) -> None:
        self._ended(sys.stdin.readline().strip())

    def _ended(self, word: str) -> None:
        # in the middle of its step a run was killed, or failed
        self.whole = word in ("done", "stopped")
        self.outcome = word or "failed"
        limit = threading.Timer(self._wait_s, _end_all)
        limit.daemon = True
        limit.start()
        self._event.set()


def follow(feeder: Feeder, end: End) -> int:
    """Bring the tracker what is recorded until the run has ended and everything is there."""
    lost, pause = False, FIRST_PAUSE_S
    while True:
        outcome, whole = end.outcome, end.whole  # before the file is read to its end
        try:
            feeder.bring(whole=outcome is not None and whole)
            if outcome is not None:
                feeder.close(outcome)
            if lost:
                say("back")
            if outcome is not None:
                say("complete")
                return 0
            lost, pause = False, FIRST_PAUSE_S
            end.wait(POLL_S)
            if end.outcome is None:
                continue
        except Exception as error:  # whatever a library raises
            if not lost:
                say("lost", why=reason(error))
            lost = True
            feeder.lose()
            if end.outcome is None:
                end.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                threading.Event().wait(LAST_PAUSE_S)


def bring_once(feeder: Feeder, outcome: str) -> int:
    """Bring the tracker up to date."""
    try:
        feeder.bring(whole=outcome != "running")
        feeder.close(outcome)
    except Exception as error:  # whatever a library raises
        say("lost", why=reason(error))
        return 1
    say("complete")
    return 0


def reason(error: Exception) -> str:
    """What a library says of a failure: one line, no secret. Of the network: what the system said, not each layer."""
    *_, root = error_chain(error)
    told = root if isinstance(root, OSError) else error
    text = " ".join(f"{type(told).__name__}: {told}".split())
    return clean(text, os.environ)[:LONGEST_WHY]


_events: Any = None


def say(what: str, **more: Any) -> None:
    """Tell the process that started this one; nobody listens when it was killed."""
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps({"say": what, **more}), file=_events, flush=True)


def main(run: Path, tracker: str) -> int:
    orders = Orders(**json.loads(sys.stdin.readline()))
    _keep_to_itself()
    place = RunDir(run)
    end = None if orders.once else End(orders.wait_s)
    with _alone(place.tracker_lock(tracker), end) as alone:
        if not alone:
            say("busy")
            return 0
        feeder = Feeder(place, tracker, orders)
        return bring_once(feeder, orders.outcome) if end is None else follow(feeder, end)


@contextmanager
def _alone(lock: Path, end: End | None) -> Iterator[bool]:
    """Hold the tracker of this run: the follower of a killed training may still be sending."""
    with lock.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if end is None:
                    yield False
                    return
                threading.Event().wait(POLL_S)
            else:
                yield True
                return


def _keep_to_itself() -> None:
    """Only what `say` says goes to the training; libraries print to nobody, and Ctrl-C is for the training alone."""
    global _events
    _events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.environ.update(QUIET)
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(5)  # training comes first


def _end_all() -> None:
    # with the processes of the libraries: a call that hangs cannot be told to end
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]), sys.argv[2])
    except Exception as error:
        say("lost", why=reason(error))
        code = 1
    # at its end a library may wait for a server once more
    os._exit(code)
