"""`python -m trainway.pod [ORDERS.json]`: the first process of a job's container, or of a job on a machine of one's own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from trainway.errors import ExitCode, UserError
from trainway.jobs.orders import Orders
from trainway.launch.nodes import NODE_RANK
from trainway.pod import ending
from trainway.pod.start import read_orders
from trainway.pod.supervisor import supervise

FIRST_WAIT_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Run the job that the orders describe; returns the exit code of `supervise`.

    Orders that cannot be read, or a place that cannot be used, are an error of three lines; on RunPod the machine is
    stopped for it, as nobody else would.
    """
    if len(arguments) > 1:
        print("usage: python -m trainway.pod [ORDERS.json]", file=sys.stderr)
        return ExitCode.CONFIG
    orders = None
    try:
        orders = read_orders(Path(arguments[0]) if arguments else None)
        return supervise(orders)
    except UserError as error:
        _say(error.lines)
        code = int(error.code)
    except Exception as error:  # such as a disk that cannot even hold the log
        _say(f"internal error: {type(error).__name__}: {error}")
        code = ExitCode.INTERNAL
    if is_first_of_pod(orders, os.environ, os.getpid(), os.getppid()):
        _stop_pod()
    return code


def is_first_of_pod(orders: Orders | None, environ: Mapping[str, str], pid: int, parent: int) -> bool:
    """Whether a pod of RunPod's is there for this process alone, as its first or the only one that its first has started.

    One that a user starts on it by hand, beside the job, is not to end it.
    """
    ours = orders is None or orders.ender == "runpod"
    first_node = all(environ.get(name, "0") == "0" for name in NODE_RANK)
    return ours and first_node and ending.POD in environ and 1 in (pid, parent)


def _stop_pod() -> None:
    """A container of RunPod's that ends is started again, and costs: have it stopped, which loses nothing."""

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    ending.keep_asking(lambda: ending.ask_runpod("stop"), _say, wait, FIRST_WAIT_S)
    while True:
        time.sleep(FIRST_WAIT_S)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody listens any more; the machine is to be ended all the same
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
