#!/usr/bin/env bash
# Build the documentation into site/ (or look at it while writing: bash scripts/docs.sh serve).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh docs
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
exec .venv/bin/mkdocs "${1:-build}" --strict
