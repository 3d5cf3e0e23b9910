"""The first process of a StatefulSet's pod: the supervisor, and sleep when nothing is left to do.

What ends there is started again, for ever: a finished run would be, and one whose settings are wrong too.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from trainway.errors import ExitCode

SETTLED = (ExitCode.DONE, ExitCode.CONFIG, ExitCode.DATA, ExitCode.ENVIRONMENT)
"""Exit codes after which another start changes nothing."""


def main(command: Sequence[str]) -> int:
    """Run the command; its exit code, at once when it is worth another start, else when SIGTERM comes."""
    asked = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def ask(number: int, _: FrameType | None) -> None:
        asked.set()
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    child = subprocess.Popen(command)
    if asked.is_set():  # before there was a child
        child.terminate()
    code = child.wait()
    if code in SETTLED and not asked.is_set():
        print(
            f"the run has ended with exit code {code}: this pod sleeps, and holds its GPUs until `trainway down`",
            flush=True,
        )
        asked.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main([sys.executable, "-m", "trainway.pod", *sys.argv[1:]]))
