"""`python -m trainway.pod.copying SOURCE ADDRESS`: copy a directory, verified; a stage, so that the guard can end it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from trainway.errors import ExitCode, UserError


def main(arguments: list[str]) -> int:
    """Copy, and say in three lines what is wrong. The libraries of the object store are imported here alone."""
    source, to = arguments
    try:
        importlib.import_module("trainway.storage.sync").copy_tree(Path(source), to)
    except UserError as error:
        for label, text in (("error", error.what), ("why", error.why), ("fix", error.fix)):
            if text:
                print(f"{label}: {text}", file=sys.stderr)
        return error.code
    print(f"copied to {to}: {source}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
