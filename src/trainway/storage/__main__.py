"""`python -m trainway.storage RUN_DIR URL --every S`: follows a run until SIGTERM or SIGINT, then copies once more."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainway.errors import UserError
from trainway.storage.follow import follow

DEFAULT_EVERY_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the last pass went well, 4 when it did not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m trainway.storage", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("url", metavar="URL", help="s3://bucket/path, gs://bucket/path or a directory")
    parser.add_argument("--every", type=float, default=DEFAULT_EVERY_S, help="seconds between two passes")
    options = parser.parse_args(arguments)
    try:
        return follow(options.run_dir, options.url, options.every)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
