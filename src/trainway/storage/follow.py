"""A process that follows a run: it ends on a signal, after one more pass, and when nobody is left who would send one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Event, Thread

from trainway.errors import ConfigError, ExitCode
from trainway.storage.sync import Syncer


def follow(run_dir: Path, url: str, every_s: float) -> int:
    """Follow the run until a signal, or until the process that started this one is gone; then once more.

    Returns exit code 0 when that last pass went well, else 4. Raises ConfigError for a wrong address or time.
    """
    if not every_s > 0:
        raise ConfigError(f"every {every_s:g} seconds is no time", "", "give a number above 0")
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    syncer = Syncer(run_dir, url, say=lambda line: print(line, file=sys.stderr, flush=True))
    done: list[bool] = []
    # beside the main thread, which then answers signals at once, in the middle of a request too
    work = Thread(target=lambda: done.append(syncer.follow(every_s, stop)), name="sync")
    work.start()
    parent = os.getppid()
    while work.is_alive():
        work.join(1.0)
        if os.getppid() != parent:
            stop.set()
    return ExitCode.DONE if done == [True] else ExitCode.ENVIRONMENT
