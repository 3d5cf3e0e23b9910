"""A stage's first process: it asks the kernel to be told when the supervisor dies, then becomes the stage's command."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def main(arguments: list[str]) -> None:
    """`arguments`: the supervisor's process id, then the command. SIGTERM comes when the supervisor ends (Linux)."""
    parent, *command = arguments
    if sys.platform.startswith("linux"):
        PR_SET_PDEATHSIG = 1  # kept over exec
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before the line above
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
