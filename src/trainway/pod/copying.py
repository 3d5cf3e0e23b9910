"""`python -m trainway.pod.copying tree|run SOURCE ADDRESS`, `... back ADDRESS RUN_DIR`: stages, so that the guard can end them."""

from __future__ import annotations

import sys
from pathlib import Path

from trainway.errors import ExitCode, UserError


def copy_model(source: str, address: str) -> str:
    """Copy a directory to an address, verified; what was done, in words."""
    from trainway.storage.transfer import copy_tree

    copy_tree(Path(source), address)
    return f"copied to {address}: {source}"


def copy_last(source: str, address: str) -> str:
    """Complete the copy of a run that is over; what was done, in words."""
    from trainway.storage.sync import copy_run

    copy_run(Path(source), address)
    return f"copied to {address}: the run {source}"


def bring_back(address: str, run_dir: str) -> str:
    """Make a run that has no checkpoint here what its copy is, if there is one; what was done, in words."""
    from trainway.storage.restore import find_run, restore

    if find_run(address) is None:
        return f"{address} holds no checkpoint: the run begins"
    found = restore(address, Path(run_dir))
    return f"brought back from {address}: the run goes on from step {found.step}"


def main(arguments: list[str]) -> int:
    """Do it, or say in three lines what is wrong. The libraries of the object store are imported here alone."""
    way, *words = arguments
    try:
        print({"tree": copy_model, "run": copy_last, "back": bring_back}[way](*words))
    except UserError as error:
        print(error.lines, file=sys.stderr)
        return error.code
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
