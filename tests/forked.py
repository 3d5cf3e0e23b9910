"""New processes for tests without their first five seconds: forked from one that has imported what all of them import.

A child is a process of its own, with its own arguments, variables, directory, output and exit code. What a library reads of the
environment while it is imported was read before, so a call that changes more than `LATE` is given a process from scratch.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LATE = ("TRAINWAY_", "PYTEST_", "RUN_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_")
"""Variables, by how they begin, that nothing reads while it is imported."""
IMPORTED = (
    "trainway.cli.app",
    "trainway.recipes.pretrain",
    "trainway.recipes.sft",
    "trainway.recipes.gad",
    "trainway.recipes.evaluation",
    "trainway.release.generate",
    "trainway.doctor.checks",
    "trainway.engines.fsdp",
)


@dataclass
class Forked:
    """A running child; its output goes to files."""

    server: Server
    number: int
    out: Path
    err: Path

    def wait(self, timeout: float) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired, and kills it then."""
        end = time.monotonic() + timeout
        while (code := self.server.ask({"poll": self.number})) is None:
            if time.monotonic() > end:
                os.killpg(self.number, signal.SIGKILL)
                raise subprocess.TimeoutExpired("a forked child", timeout)
            time.sleep(0.01)
        return code


@dataclass
class Server:
    """The process that children are forked from."""

    process: subprocess.Popen[str]
    environ: Mapping[str, str]
    scratch: Path
    children: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls) -> Server:
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        server = cls(process, environ, Path(tempfile.mkdtemp(prefix="forked-")))
        atexit.register(process.kill)
        return server

    def ask(self, question: Mapping[str, object]) -> int | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.turn:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        assert answer, "the process that children are forked from has died"
        found: int | None = json.loads(answer)
        return found

    def run(self, module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Forked:
        """Run `python -m module ARGUMENTS` in this process's directory."""
        self.children += 1
        place = self.scratch / str(self.children)
        out, err = place.with_suffix(".out"), place.with_suffix(".err")
        question = {
            "module": module, "arguments": list(arguments), "environ": dict(environ),
            "cwd": os.getcwd(), "out": str(out), "err": str(err),
        }  # fmt: skip
        number = self.ask(question)
        assert number is not None
        return Forked(self, number, out, err)


_server: Server | None = None


def fork(module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Forked | None:
    """A child that runs `python -m module ARGUMENTS`; None where it needs a process from scratch."""
    global _server
    if not hasattr(os, "fork"):
        return None
    if _server is None:
        _server = Server.start()
    changed = {
        name for name in {*environ, *_server.environ} if environ.get(name) != _server.environ.get(name)
    }
    if any(not name.startswith(LATE) for name in changed):
        return None
    return _server.run(module, arguments, environ)


def main() -> None:
    """Serve one question a line: run a child and say its number, or say a child's exit code, null while it runs."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    # children speak through files; this channel is for answers alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            done, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _become(question)
                return
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(question: Mapping[str, object]) -> None:
    """Be the child from here on: ends with SystemExit, as a program does."""
    os.setsid()
    for place, number in (("out", 1), ("err", 2)):
        opened = os.open(str(question[place]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    environ = question["environ"]
    assert isinstance(environ, dict)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(str(question["cwd"]))
    arguments = question["arguments"]
    assert isinstance(arguments, list)
    sys.argv = [str(question["module"]), *arguments]
    runpy.run_module(str(question["module"]), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
