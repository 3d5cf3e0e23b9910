#!/usr/bin/env bash
# From a fresh machine to a tested one: set-up with the development tools, then the whole suite.
# Usage: bash scripts/test.sh [pytest arguments]     e.g. bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
# two tests at a time, each with one thread: the threads of several would wait for each other
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# the long tests stand first: whoever is done with the short ones takes some of them over
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" "$@"
