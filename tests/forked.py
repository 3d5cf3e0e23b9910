"""New processes for tests without their first five seconds: forked from one that has imported what all of them import.

A child is a process of its own, with its own arguments, variables, directory, output and exit code. What a library reads of the
environment while it is imported was read before, so a call that changes more than `LATE` is given a process from scratch.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LATE = (
    "TRAINWAY_", "PYTEST_", "RUN_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_",
    "ROLE_", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
"""Variables, by how they begin, that nothing reads while it is imported."""
IMPORTED = (
    "trainway.cli.app",
    "trainway.recipes.pretrain",
    "trainway.recipes.sft",
    "trainway.recipes.gad",
    "trainway.recipes.evaluation",
    "trainway.release.generate",
    "trainway.release.verify",
    "trainway.tracking.tensorboard",
    "trainway.planning.plan_text",
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
        scratch = Path(tempfile.mkdtemp(prefix="forked-"))
        place = scratch / "socket"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(place)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        atexit.register(process.kill)
        server = cls(process, environ, scratch)
        server.interpreter.write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {Path(__file__).with_name("forked_rank.py")} {place} "$@"\n'
        )
        server.interpreter.chmod(0o700)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return server

    @property
    def interpreter(self) -> Path:
        """What torchrun is to start ranks with, so that they are forked too."""
        return self.scratch / "python"

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
    if not _may_fork(environ, _server.environ):
        return None
    return _server.run(module, arguments, {**environ, "PYTHON_EXEC": str(_server.interpreter)})


def _may_fork(environ: Mapping[str, str], born_with: Mapping[str, str]) -> bool:
    changed = {name for name in {*environ, *born_with} if environ.get(name) != born_with.get(name)}
    return all(name.startswith(LATE) for name in changed)


@dataclass
class _Rank:
    """A child that `forked_rank` has asked for, and waits for."""

    number: int
    line: socket.socket


def main(place: str) -> None:
    """Serve two kinds of clients, forever, in one thread: that alone may be forked.

    On stdin, one question a line: run a child and say its number, or say a child's exit code, null while it runs. On the
    socket at `place`: the arguments, variables, directory and files of a rank; its number (null: it needs a process from
    scratch) and its exit code are said.
    """
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    # children speak through files; this channel is for answers alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    born_with = dict(os.environ)
    ranks: list[_Rank] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(64)
        print("ready", file=answers, flush=True)
        while True:
            ready, _, _ = select.select([sys.stdin, listening], [], [], 0.02 if ranks else None)
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return None
                question = json.loads(line)
                if "poll" in question:
                    done, status = os.waitpid(question["poll"], os.WNOHANG)
                    answer = os.waitstatus_to_exitcode(status) if done else None
                else:
                    answer = os.fork()
                    if answer == 0:
                        _close(answers, listening, *(rank.line for rank in ranks))
                        return _become(question, *_opened(question))
                print(json.dumps(answer), file=answers, flush=True)
            if listening in ready:
                client, _ = listening.accept()
                question, files = _asked(client)
                number = _fork_rank(question, born_with)
                if number == 0:
                    _close(answers, listening, client, *(rank.line for rank in ranks))
                    return _become(question, *files)
                for file in files:
                    os.close(file)
                client.sendall(json.dumps(number).encode() + b"\n")
                if number is None:
                    client.close()
                else:
                    ranks.append(_Rank(number, client))
            ranks = [rank for rank in ranks if not _ended(rank)]


def _asked(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The question of a `forked_rank`, and its three files."""
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    question: dict[str, Any] = json.loads(client.makefile().readline())
    return question, files


def _fork_rank(question: dict[str, Any], born_with: Mapping[str, str]) -> int | None:
    """As os.fork; None when the rank is no module, or its variables are others than those that were imported under."""
    words = [word for word in question["arguments"] if word != "-u"]
    environ = {name: value for name, value in question["environ"].items() if name != "PYTHON_EXEC"}
    if words[:1] != ["-m"] or not _may_fork(environ, born_with):
        return None
    question.update(module=words[1], arguments=words[2:])
    return os.fork()


def _ended(rank: _Rank) -> bool:
    """Whether it has ended, which is said then. It is killed when nobody waits for it any more."""
    done, status = os.waitpid(rank.number, os.WNOHANG)
    if done:
        with suppress(OSError):
            rank.line.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode() + b"\n")
        rank.line.close()
        return True
    if select.select([rank.line], [], [], 0)[0]:  # nothing more is said there: it is closed
        with suppress(ProcessLookupError):
            os.killpg(rank.number, signal.SIGKILL)
    return False


def _close(*opened: Any) -> None:
    for one in opened:
        one.close()


def _opened(question: Mapping[str, Any]) -> list[int]:
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    out, err = (os.open(question[name], appending, 0o600) for name in ("out", "err"))
    return [os.open(os.devnull, os.O_RDONLY), out, err]


def _become(question: Mapping[str, Any], *files: int) -> None:
    """Be the child from here on: ends with SystemExit, as a program does. files: its stdin, stdout and stderr."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os.environ.clear()
    os.environ.update(question["environ"])
    os.chdir(question["cwd"])
    sys.argv = [question["module"], *question["arguments"]]
    runpy.run_module(question["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
