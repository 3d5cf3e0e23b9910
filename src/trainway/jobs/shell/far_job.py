"""A job at the other end of a connection: what the machine is, what is installed, which processes are the job's.

Sent there as text, beside `far_end.py`, and under the same conditions.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from typing import Any, BinaryIO

from trainway.jobs.shell.far_end import VERBS, full, is_held, read_text, tell

MARK = "TRAINWAY_JOB"
"""Environment of the supervisor and of all that it starts: the job's name with its token."""
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3", "python")
START_S = 60.0


def machine(root: str) -> dict[str, Any]:
    """The facts that decide whether a job can run here."""
    root = full(root)
    there = root
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    return {
        "root": root,
        "writable": os.access(there, os.W_OK | os.X_OK),
        "free": shutil.disk_usage(there).free,
        "installed": os.path.exists(os.path.join(root, "trainway-env", ".trainway")),
        "pythons": [found for found in map(_python, PYTHONS) if found],
        "gpus": _gpus(),
    }


def _python(name: str) -> list[Any] | None:
    """[path, major, minor, whether it makes virtual environments]."""
    path = shutil.which(name)
    if path is None:
        return None
    code = (
        "import json, sys, importlib.util as u;"
        "print(json.dumps([*sys.version_info[:2], all(u.find_spec(n) for n in ('venv', 'ensurepip'))]))"
    )
    try:
        done = subprocess.run(
            [path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        )
        return [path, *json.loads(done.stdout)]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.decode(errors="replace").splitlines() if done.returncode == 0 else []


def install(told: dict[str, Any], ask: BinaryIO, answer: BinaryIO) -> None:
    """Make the virtual environment `venv` and run the `steps` in it, unless its stamp is `version` already.

    A step is the arguments of `pip install`. Answers: {say} lines, at last {code, said}. Others wait for the lock.
    """
    venv = full(told["venv"])
    os.makedirs(os.path.dirname(venv), exist_ok=True)
    with open(venv + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, python = os.path.join(venv, ".trainway"), os.path.join(venv, "bin", "python")
        if read_text(stamp) == told["version"]:
            tell(answer, {"code": 0, "said": "", "new": False})
            return
        steps = [
            [python, "-m", "pip", "install", "--disable-pip-version-check", *step] for step in told["steps"]
        ]
        if not os.path.exists(python):
            steps.insert(0, [told["python"], "-m", "venv", venv])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stamp)
        for step in steps:
            tell(answer, {"say": "installing: " + " ".join(step[1:])})
            done = subprocess.run(
                step, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if done.returncode != 0:
                lines = done.stdout.decode(errors="replace").strip().splitlines()
                tell(answer, {"code": done.returncode, "said": "\n".join(lines[-5:])})
                return
        write(stamp, told["version"])
        tell(answer, {"code": 0, "said": "", "new": True})


def write(path: str, text: str) -> int:
    """A file for its owner alone, complete or not there; its bytes."""
    path = full(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.tmp-{os.getpid()}"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return os.path.getsize(path)


def processes(mark: str | None = None) -> list[dict[str, Any]]:
    """The living processes that bear the mark of a job, or any job's: {pid, mark, supervisor}. Our own are none."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:  # another user's, or gone meanwhile
            continue
        marks = [item[len(MARK) + 1 :] for item in variables if item.startswith(MARK.encode() + b"=")]
        if marks and mark in (None, os.fsdecode(marks[0])) and any(words):
            known = {"pid": int(name), "mark": os.fsdecode(marks[0]), "supervisor": b"trainway.pod" in words}
            found.append(known)
    return found


def start(told: dict[str, Any]) -> dict[str, Any]:
    """Start `command` as the job's supervisor, in a session of its own, unless one holds the lock: {pid} or {code, said}.

    told: `variables` over our environment, `orders` and `text` to write there, `stop` to remove, `log` for what it
    says, `lock` which it holds soon.
    """
    if is_held(told["lock"]):
        return {"pid": None}
    write(told["orders"], told["text"])
    with contextlib.suppress(FileNotFoundError):
        os.unlink(told["stop"])
    with open(told["log"], "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            told["command"],
            cwd=told["cwd"],
            env=dict(os.environ, **told["variables"]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        code = process.poll()
        if code is not None:
            with open(told["log"], "rb") as log:
                log.seek(begin)
                return {"code": code, "said": log.read()[-2000:].decode(errors="replace")}
        if is_held(told["lock"]):
            break
        time.sleep(0.1)
    return {"pid": process.pid}


def end(mark: str, stop: str | None, number: int) -> int:
    """Signal the job's supervisor, or with SIGKILL all its processes; how many. `stop`: the request for it, written first."""
    if stop is not None and os.path.isdir(os.path.dirname(stop)):
        write(stop, "")
    found = [one for one in processes(mark) if one["supervisor"] or number == signal.SIGKILL]
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one["pid"], number)
    return len(found)


def look(told: dict[str, Any]) -> dict[str, Any]:
    """The job's state as text, whether its lock is held, and its processes."""
    return {
        "state": read_text(told["state"]),
        "held": is_held(told["lock"]),
        "processes": processes(told["mark"]),
    }


VERBS.update(
    {
        "machine": lambda told, ask, answer: tell(answer, machine(told["root"])),
        "install": install,
        "write": lambda told, ask, answer: tell(answer, write(told["path"], told["text"])),
        "processes": lambda told, ask, answer: tell(answer, processes(told["mark"])),
        "start": lambda told, ask, answer: tell(answer, start(told)),
        "end": lambda told, ask, answer: tell(answer, end(told["mark"], told["stop"], told["signal"])),
        "look": lambda told, ask, answer: tell(answer, look(told)),
    }
)
