"""A program with the verbs of `trainway`, for tests of what runs them: a fast one that misbehaves on request.

`python -m tests.fake_trainway VERB ...` notes each call in $FAKE_DIR/calls.jsonl and does what $FAKE_DIR/VERB.json says;
`train` writes the files of a run as a real one does, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def main(arguments: list[str]) -> int:
    home = Path(os.environ["FAKE_DIR"])
    verb = arguments[0]
    with (home / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"words": arguments, "pid": os.getpid(), "cwd": os.getcwd()}) + "\n")
    plan = home / f"{verb}.json"
    told: dict[str, Any] = json.loads(plan.read_text()) if plan.exists() else {}
    if told.get("once"):
        plan.unlink()
    print(f"this is {verb}", flush=True)
    if verb == "train":
        return train(yaml.safe_load(Path(arguments[1]).read_text()), told)
    if verb == "export" and not told:
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "model.safetensors").write_bytes(b"weights")
    if told.get("hang"):
        time.sleep(3600)
    return int(told.get("code", 0))


def train(config: dict[str, Any], told: dict[str, Any]) -> int:
    """Steps of `step_s` each; `die_at`: [step, exit code or -signal]; `hang_at`: a step that takes for ever;
    `deaf`: SIGTERM is not heard."""
    stop = []
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN if told.get("deaf") else lambda number, frame: stop.append(number)
    )
    run = Path(config["run_dir"])
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    total, every = config["train"]["total_steps"], config["checkpoint"]["save_every"]
    step = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
    with (run / "metrics.jsonl").open("a") as file:
        while step < total:
            if told.get("hang_at") == step:
                time.sleep(3600)
            if told.get("die_at", [None])[0] == step:
                code = told["die_at"][1]
                if code < 0:
                    os.kill(os.getpid(), -code)
                return int(code)
            time.sleep(told.get("step_s", 0.01))
            step += 1
            file.write(json.dumps({"step": step, "pid": os.getpid()}) + "\n")
            file.flush()
            if stop or step % every == 0 or step == total:
                (checkpoints / f"step-{step}").mkdir(exist_ok=True)
            if stop:
                return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
