"""torchrun, ending with the exit code of its ranks instead of a traceback of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

from trainway.errors import ExitCode
from trainway.launch.nodes import torchrun_options
from trainway.launch.stopped import kill_stopped_ranks

DOCUMENTED = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.ENVIRONMENT, ExitCode.STOPPED)


def main(arguments: list[str]) -> int:
    """Run torchrun with its own command line; the exit code is that of the run.

    A rank's documented exit code (2, 3, 4, 75) wins over those of ranks that only fell with it. When the nodes do
    not find each other it is 4; when every rank was ended by SIGTERM, before it could save, 143; when one was ended by
    SIGKILL, 137.
    """
    _die_with_parent()
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    # It would print pages about ranks that have said themselves, in three lines, what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    _outlive_the_meeting_place()
    kill_stopped_ranks()

    try:
        torchrun(arguments)
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException:
        return 128 + signal.SIGTERM  # before there were ranks that could have saved anything
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        _say_that_nodes_are_missing(arguments, error)
        return ExitCode.ENVIRONMENT
    return 0


def _exit_code(codes: dict[int, int]) -> int:
    if documented := [code for code in codes.values() if code in DOCUMENTED]:
        return documented[0]
    if all(code == -signal.SIGTERM for code in codes.values()):
        return 128 + signal.SIGTERM
    for rank, code in codes.items():
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(
            f"error: rank {rank} {how}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    if -signal.SIGKILL in codes.values():
        return 128 + signal.SIGKILL
    return ExitCode.INTERNAL


def _say_that_nodes_are_missing(arguments: list[str], error: Exception) -> None:
    told = torchrun_options(arguments[: arguments.index("-m")])
    place = told.get("rdzv-endpoint") or told.get("master-addr") or "the place given to torchrun"
    reason = str(error.__cause__ or error).strip().partition("\n")[0]
    print(
        f"error: the nodes of this run did not find each other at {place}\n"
        f"why: {type(error).__name__}: {reason}\n"
        "fix: start the run on every node with the same number of nodes and the same address, see that the port is "
        "open between them, and raise engine.timeout_s when some start late",
        file=sys.stderr,
    )


def _outlive_the_meeting_place() -> None:
    # A node whose ranks have ended leaves, and may take the rendezvous store with it while the others' ranks still
    # write; torchrun would end those. Nodes that come late are none of ours: their number is fixed.
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    DynamicRendezvousHandler.num_nodes_waiting = lambda self: 0  # type: ignore[method-assign]


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
