#!/usr/bin/env bash
# From a fresh machine to a tested one: set-up with the development tools, then the whole suite.
# Usage: bash scripts/test.sh [pytest arguments]     e.g. bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev

# What tests of jobs on other machines, and of pages in a browser, need of Debian; where it cannot be had, those tests are skipped and say so.
needed=()
[ -x /usr/sbin/sshd ] || needed+=(openssh-server)
command -v ssh >/dev/null || needed+=(openssh-client)
command -v chromium >/dev/null || needed+=(chromium)
if [ "${#needed[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "test: installing ${needed[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}"; } >/dev/null 2>&1 ||
    echo "test: ${needed[*]} cannot be installed: the tests that need it are skipped"
fi

# two tests at a time, each with one thread: the threads of several would wait for each other
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# the long tests stand first: whoever is done with the short ones takes some of them over
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" "$@"
