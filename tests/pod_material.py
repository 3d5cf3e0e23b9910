"""Jobs for tests of the supervisor: orders, a start in a process of its own, and RunPod's API as far as a pod needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import QuietHandler, http_server
from trainway.jobs.orders import JobDir, Orders, PodState

ROOT = Path(__file__).resolve().parent.parent


def orders_for(root: Path, **more: Any) -> Orders:
    """Orders for a job `try` whose run is runs/try: 20 steps, saved every 10."""
    limits = {"hours": 1.0, "save_minutes": 2, **more.pop("limits", {})}
    config = {"run_dir": "runs/try", "train": {"total_steps": 20}, "checkpoint": {"save_every": 10}}
    values = {"job": "try", "config": config, "root": str(root), "limits": limits, "guard_every_s": 0.1}
    return Orders.model_validate({**values, **more})


class Job:
    """One job on this machine, whose stages are those of `tests.fake_trainway`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fake = root / "fake"
        self.fake.mkdir()
        self.dir = JobDir.of(root, "try")
        self.processes: list[subprocess.Popen[bytes]] = []

    def tell(self, verb: str, **what: Any) -> None:
        (self.fake / f"{verb}.json").write_text(json.dumps(what))

    def let_pass(self, seconds: float) -> None:
        """Put the supervisor's clock forward."""
        (self.fake / "later").write_text(str(seconds))

    def start(self, orders: Orders, rank: int = 0, **environ: str) -> subprocess.Popen[bytes]:
        self.dir.node(rank).path.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "FAKE_DIR": str(self.fake), "TRAINWAY_ORDERS": orders.model_dump_json()}
        env |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            "NO_PROXY": "127.0.0.1",
            **environ,
        }
        command = [sys.executable, "-m", "tests.fake_pod"]
        process = subprocess.Popen(command, cwd=self.root, env=env, stdout=subprocess.PIPE)
        self.processes.append(process)
        return process

    def run(self, orders: Orders, **environ: str) -> int:
        process = self.start(orders, **environ)
        self.said = process.communicate(timeout=250)[0].decode()
        return process.returncode

    @property
    def state(self) -> PodState:
        return PodState.model_validate_json(self.dir.state.read_text())

    @property
    def log(self) -> str:
        return self.dir.log.read_text()

    @property
    def calls(self) -> list[dict[str, Any]]:
        path = self.fake / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        return [call["words"][0] for call in self.calls]

    @property
    def steps(self) -> list[int]:
        path = self.root / "runs" / "try" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]


@contextmanager
def runpod(answers: Callable[[int, str, str], int]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """An API whose answer number N to (method, path) has the status that `answers` gives; yields (address, requests)."""
    requests: list[tuple[str, str, str]] = []

    class Handler(QuietHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            requests.append((self.command, self.path, body))
            assert self.headers["Authorization"] == "Bearer " + KEY
            code = answers(len(requests), self.command, self.path)
            said = b"" if code == 204 else json.dumps({"title": "busy", "status": code}).encode()
            self.reply(code, said)

    with http_server(Handler) as url:
        yield url, requests


KEY = "canary-8d1f-of-a-key"
