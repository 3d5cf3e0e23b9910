"""Stands in for the interpreter that torchrun starts a rank with: has the rank forked, passes signals on, ends as it ends.

Alone and from the standard library, so that it starts at once. Its first argument is where `tests.forked` listens.
"""

import json
import os
import signal
import socket
import sys


def main(place: str, arguments: list[str]) -> None:
    question = {"arguments": arguments, "environ": dict(os.environ), "cwd": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        answers = line.makefile()
        socket.send_fds(line, [b"\n"], [0, 1, 2])
        line.sendall(json.dumps(question).encode() + b"\n")
        number = json.loads(answers.readline())
        if number is None:  # it needs a process from scratch
            os.execv(sys.executable, [sys.executable, *arguments])
        for passed_on in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(passed_on, lambda name, frame: os.kill(number, name))
        code = json.loads(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
