"""torchrun, ending with the exit code of its ranks instead of a traceback of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

from trainway.errors import ExitCode

DOCUMENTED = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.ENVIRONMENT, ExitCode.STOPPED)


def main(arguments: list[str]) -> int:
    """Run torchrun with its own command line; the exit code is that of the run.

    A rank's documented exit code (2, 3, 4, 75) wins over those of ranks that only fell with it.
    """
    _die_with_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # It would print pages about ranks that have said themselves, in three lines, what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if documented := [code for code in codes.values() if code in DOCUMENTED]:
            return documented[0]
        for rank, code in codes.items():
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            print(
                f"error: rank {rank} {how}; the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
        return ExitCode.INTERNAL
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
