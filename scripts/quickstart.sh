#!/usr/bin/env bash
# From a fresh machine to a trained model: set-up, then the main job on the embedded corpus.
# Usage: bash scripts/quickstart.sh [--out DIR] [key=value ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/trainway" quickstart "$@"
