"""How soon the command line answers: seconds of whole processes, beside the start of the libraries that each verb needs.

python benchmarks/start.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "src/trainway/jobs/examples"
PRESETS = sorted(path.stem for path in (EXAMPLES.parents[1] / "config/presets").glob("*.yaml"))
VERBS = {
    ("--help",): "typer",
    ("config", "check", "m3_medium"): "typer, pydantic, yaml",
    ("compare", "--help"): "typer",
    **{("plan", name): "typer, pydantic, yaml" for name in PRESETS},
    **{("up", str(path), "--dry-run"): "typer, pydantic, yaml" for path in sorted(EXAMPLES.glob("*.yaml"))},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for words, libraries in VERBS.items():
        commands = {"trainway": ["-m", "trainway", *words], libraries: ["-c", f"import {libraries}"]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
                if done.returncode not in (0, 4):  # 4: a plan that fits nowhere
                    raise SystemExit(done.stderr)
                seconds[name].append(time.perf_counter() - began)
        ours, theirs = (statistics.median(found) for found in seconds.values())
        print(f"trainway {' '.join(words)}: {ours:.3f} s; import {libraries}: {theirs:.3f} s")


if __name__ == "__main__":
    main()
