"""`python -m trainway`: the command line without an installed script."""

import sys

from trainway.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
