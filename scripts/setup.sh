#!/usr/bin/env bash
# Makes .venv and installs Trainway at the pinned versions; does nothing when that is done already.
# Usage: bash scripts/setup.sh [dev|docs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
case "$extra" in
  "" | dev | docs) ;;
  *) echo "error: unknown argument '$extra'; usage: bash scripts/setup.sh [dev|docs]" >&2; exit 2 ;;
esac
torch_pin="$(grep -E '^torch==' constraints.txt)"

find_python() {
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is not installed" >&2
  echo "fix: install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python" >&2
  return 4
}

make_venv() {
  if "$1" -m venv .venv >/dev/null 2>&1; then
    return
  fi
  # Debian ships venv apart from Python
  rm -rf .venv
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "setup: installing python3-venv"
    version="$("$1" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')"
    apt-get update -qq >/dev/null
    apt-get install -y -qq "python$version-venv" >/dev/null 2>&1 || apt-get install -y -qq python3-venv >/dev/null
    "$1" -m venv .venv
    return
  fi
  echo "error: Python's venv module does not work" >&2
  echo "fix: apt-get install python3-venv" >&2
  return 4
}

if [ ! -x .venv/bin/python ]; then
  python="$(find_python)"
  echo "setup: making .venv with $("$python" --version)"
  make_venv "$python"
fi

stamp=".venv/.trainway-setup"
wanted="$(cat constraints.txt pyproject.toml scripts/setup.sh | cksum | tr ' ' '-') $PWD"
# dev holds everything that the plain install has
if [ -f "$stamp" ] && { [ "$(cat "$stamp")" = "$wanted dev" ] || [ "$(cat "$stamp")" = "$wanted $extra" ]; }; then
  exit 0
fi

pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check)
# first and by its exact pin alone: a machine without a GPU gets the CPU build where its package source has one
echo "setup: installing $torch_pin"
"${pip[@]}" "$torch_pin"
echo "setup: installing trainway${extra:+ and its $extra tools} at the versions in constraints.txt"
"${pip[@]}" -c constraints.txt -e ".${extra:+[$extra]}"
if [ "$extra" = dev ]; then
  deepspeed_pin="$(grep -E '^deepspeed==' constraints.txt)"
  # its own setup imports torch, so it is built here and not in an environment of its own; nothing is compiled
  echo "setup: installing $deepspeed_pin"
  "${pip[@]}" -c constraints.txt setuptools wheel ninja
  "${pip[@]}" -c constraints.txt --no-build-isolation "$deepspeed_pin"
fi
echo "$wanted $extra" >"$stamp"
echo "setup: done"
