"""torchrun, ending with the exit code of its ranks instead of a traceback of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def main(arguments: list[str]) -> int:
    """Run torchrun with its own command line; the exit code is that of the run.

    A rank's documented exit code (2, 3, 4, 75) wins over those of ranks that only fell with it.
    """
    _die_with_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        documented = [code for code in codes if code in (2, 3, 4, 75)]
        first = documented[0] if documented else codes[0]
        return first if first > 0 else 1  # negative: ended by a signal
    except SignalException:
        return 128 + signal.SIGTERM  # before there were ranks that could have saved anything
    return 0


def _die_with_parent() -> None:
    # Killed outright, the launching command cannot pass a signal on; the kernel does (Linux only).
    parent = os.environ.get("TRAINWAY_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
