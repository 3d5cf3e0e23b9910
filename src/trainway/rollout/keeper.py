"""A command that lives no longer than the process that started it: a keeper ends it, with all that it has started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 20.0
"""Time that a command has to end by itself when it is asked to."""


class Kept:
    """A command under a keeper, or a keeper alone; with directories that are gone at the end.

    The end comes with `close`, or with the end of this process, however that came about.

    log: takes what the command prints; show: it goes where this process's does; environment: the command's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        remove: Sequence[Path],
        log: Path | None = None,
        show: bool = False,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._remove = remove
        # -I: the keeper needs the standard library alone, whatever lies beside this file or in PYTHONPATH
        keeper = [sys.executable, "-I", __file__, *map(str, remove), "--", *command]
        with open(log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                keeper,
                stdin=subprocess.PIPE,
                stdout=None if show else output,
                stderr=None if show else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in a terminal is for the training process, which saves first
            )

    def exit_code(self) -> int | None:
        """The command's, once it has ended by itself; its directories stay until `close`."""
        return self._process.poll()

    def close(self) -> None:
        """End the command and remove the directories; at once, but for the time that the command takes to end."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for directory in self._remove:  # where the command had ended before, the keeper has left them
            shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Keep the command after `--` in the arguments; before it are the directories to remove with it."""
    split = arguments.index("--")
    command = arguments[split + 1 :]
    asked, over = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        asked.set()
        over.set()

    def await_parent() -> None:
        # nobody writes to the pipe: it ends when its last writer has, by whatever cause
        os.read(sys.stdin.fileno(), 1)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=await_parent, daemon=True).start()
    code = _keep(command, asked, over) if command else int(not over.wait())
    if asked.is_set():
        for directory in arguments[:split]:
            shutil.rmtree(directory, ignore_errors=True)
    return code


def _keep(command: list[str], asked: threading.Event, over: threading.Event) -> int:
    """Run the command until it ends, or until the end is asked for; then nothing of it is left."""
    # a group of its own holds all that it starts, also what outlives it
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ended = threading.Event()

    def await_child() -> None:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        ended.set()
        over.set()

    threading.Thread(target=await_child, daemon=True).start()
    over.wait()
    with suppress(ProcessLookupError, PermissionError):  # nothing but the ended child is left
        if asked.is_set():
            os.killpg(child.pid, signal.SIGTERM)
            ended.wait(GRACE_S)
        # before the child is reaped: until then no other group can have its number
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
