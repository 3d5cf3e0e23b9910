"""A machine reached by OpenSSH: commands as argument lists, its key pinned, a dead line noticed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from unicodedata import category

from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.jobs.orders import JobDir, PodState
from trainway.jobs.shell import far_end, far_job
from trainway.jobs.shell.command import (
    LOST,
    Address,
    ConnectionLost,
    connection_fault,
    last_line,
    ssh_command,
)
from trainway.jobs.shell.host_keys import pin_host_key
from trainway.jobs.target import Say

RETRY_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 30.0, 30.0)
"""Pauses between attempts that bring nothing; after the last one it is given up."""
_FAR_MODULES = ((far_end.__name__, far_end), (far_job.__name__, far_job))
_HOST = re.compile(r"[A-Za-z0-9_.:\[][A-Za-z0-9_.:%\[\]-]*")
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@+-]*")


class FarEnd:
    """Our program at the other end, waiting for questions. BrokenPipeError means that the line is cut."""

    def __init__(self, where: str, ask: BinaryIO, answer: BinaryIO) -> None:
        self.where, self.to, self.answers = where, ask, answer

    def begin(self, verb: str, **told: Any) -> None:
        """Ask, without waiting for the answer."""
        self.to.write(json.dumps({"verb": verb, **told}).encode() + b"\n")
        self.to.flush()

    def ask(self, verb: str, **told: Any) -> Any:
        """Ask for something with one answer."""
        self.begin(verb, **told)
        return self.answer()

    def answer(self) -> Any:
        """The next line of JSON. Raises EnvironmentFault for a fault of the other end."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise BrokenPipeError
        return self.checked(json.loads(line))

    def checked(self, value: Any) -> Any:
        """`value`, unless it is a fault."""
        if isinstance(value, dict) and "fault" in value:
            raise EnvironmentFault(
                f"{self.where}: {value['fault']}", "so says the machine", "see to it there"
            )
        return value

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        block = self.answers.read(size)
        if len(block) < size:
            raise BrokenPipeError
        return block


class Connection:
    """SSH to one machine. Nothing is sent to a machine that shows another key than the one in `known_hosts`.

    Raises ConfigError for an address that is none, EnvironmentFault where there is no ssh.
    """

    def __init__(self, address: Address, known_hosts: Path) -> None:
        if not _HOST.fullmatch(address.host):
            raise ConfigError(f"{address.host!r} is not the name of a host", "", "correct ssh.host")
        if address.user is not None and not _USER.fullmatch(address.user):
            raise ConfigError(f"{address.user!r} is not the name of a user", "", "correct ssh.user")
        if shutil.which("ssh") is None:
            raise EnvironmentFault(
                "there is no `ssh` on this machine", "", "install it: apt-get install openssh-client"
            )
        self.address = address
        self.known_hosts = known_hosts
        if address.host_key is not None:
            pin_host_key(known_hosts, address.host_key)

    def command(self, remote: Sequence[str] = (), *, options: Sequence[str] = ()) -> list[str]:
        """The ssh command line that runs `remote` there."""
        return ssh_command(self.address, self.known_hosts, options=options, command=remote)

    def run(
        self, command: Sequence[str], *, input: bytes | None = None, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `command` there, its words exactly as given; what it printed and its exit code.

        Raises:
            ConnectionLost: the line is cut, or the command took longer than `timeout_s`.
            EnvironmentFault: the machine does not let us in, or is not the one that was pinned.
        """
        line = self.command(command, options=["ClearAllForwardings=yes"])
        try:
            done = subprocess.run(
                line,
                input=input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConnectionLost(
                f"{self.address} did not answer",
                f"`{command[0]}` took longer than {timeout_s:g} s there",
                "see whether the machine is well, then try again",
            ) from None
        self.check(done.returncode, done.stderr)
        return done

    def stream(self, command: Sequence[str]) -> Iterator[str]:
        """The lines that `command` prints there, as they come. Raises as `run`, and when it fails."""
        with self.open(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    @contextmanager
    def open(
        self, command: Sequence[str], *, stdin: int = subprocess.DEVNULL
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`command` running there, its output a pipe; ended with the block. Raises as `run`, and when it fails."""
        line = self.command(command, options=["ClearAllForwardings=yes"])
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(line, stdin=stdin, stdout=subprocess.PIPE, stderr=errors)
            alive = cut = True
            try:
                yield process
                alive = cut = False
            except BrokenPipeError:  # it ended while we wrote or read: why, is said below
                alive = False
            finally:
                if alive:
                    process.kill()
                _close(process)
            errors.seek(0)
            said = errors.read()
        self.check(process.returncode, said)
        if process.returncode < 0 or (cut and process.returncode in (0, 1)):
            raise connection_fault(self.address, "")
        if process.returncode != 0:
            raise EnvironmentFault(
                f"`{command[0]}` failed on {self.address}",
                last_line(said.decode(errors="replace")) or f"exit code {process.returncode}",
            )

    def interactive(self, command: Sequence[str] = ()) -> int:
        """A shell there, or one command with the terminal; its exit code."""
        line = self.command(command, options=["RequestTTY=auto"])
        code = subprocess.run(line, check=False).returncode
        if code == LOST:
            self.check(*self._why_lost())
        return code

    def forward(self, ports: Mapping[int, int]) -> int:
        """Make {port here: port there} reachable on 127.0.0.1, there and here, until interrupted.

        A line that is cut is made again; the tunnel ends with this process. Raises as `run`, and EnvironmentFault naming
        a port that is taken here.
        """
        words = [
            word for here, there in ports.items() for word in ("-L", f"127.0.0.1:{here}:127.0.0.1:{there}")
        ]
        line = self.command(["cat"], options=["ExitOnForwardFailure=yes", "GatewayPorts=no"])
        line[1:1] = words
        failures, ever_up = 0, False
        try:
            while True:
                up, code, said = _hold_open(line)
                if code == 0:
                    return 0
                fault = connection_fault(self.address, said, self.known_hosts)
                ever_up, failures = ever_up or up, 1 if up else failures + 1
                # where nothing has been reachable yet, say why
                if not isinstance(fault, ConnectionLost) or not ever_up or failures > len(RETRY_S):
                    raise fault
                time.sleep(RETRY_S[failures - 1])
        except KeyboardInterrupt:
            return 0

    def upload(self, source: Path, to: str, say: Say) -> None:
        """Bring a file or directory there, to the path `to`; goes on where it was cut, every byte verified.

        Raises as `run`; ConfigError for a link that leads out of the directory; DataError for a file that changes.
        """
        from trainway.jobs.shell.transfer import upload

        upload(self, source, to, say)

    def download(self, source: str, to: Path, say: Say) -> None:
        """Bring the file or directory `source` from there to the path `to`; as `upload`."""
        from trainway.jobs.shell.transfer import download

        download(self, source, to, say)

    @contextmanager
    def far_end(self) -> Iterator[FarEnd]:
        """Our own program (`far_end.py` and those beside it) there, for as many questions as one likes.

        Raises as `run`, and EnvironmentFault for what the disk there says.
        """
        program = _program()
        boot = "import sys;exec(sys.stdin.buffer.read(int(sys.argv[1])))"
        with self.open(["python3", "-c", boot, str(len(program))], stdin=subprocess.PIPE) as process:
            ask, answer = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
            ask.write(program)
            ask.flush()
            while (line := answer.readline()) != far_end.HELLO:
                if not line:
                    raise BrokenPipeError  # it did not come so far
            yield FarEnd(str(self.address), ask, answer)

    def ask(self, verb: str, **told: Any) -> Any:
        """One answer of our program there. Raises as `far_end`."""
        with self.far_end() as far:
            return far.ask(verb, **told)

    def check(self, code: int, said: bytes) -> None:
        """Raise what ssh complains of when it, and not the command, has failed with this exit code."""
        if code == LOST:
            raise connection_fault(self.address, said.decode(errors="replace"), self.known_hosts)

    def _why_lost(self) -> tuple[int, bytes]:
        # on a terminal ssh has spoken to the user; ask once more for the reason
        done = subprocess.run(
            self.command(["true"]), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        return done.returncode, done.stderr


def remote_logs(connection: Connection, job_dir: JobDir, *, follow: bool, tail: int | None) -> Iterator[str]:
    """Lines of the job's log, without their ends and control bytes, by their place in the file: a line that is cut is
    made again, and nothing is lost or repeated.

    Args:
        follow: go on until the job has ended.
        tail: begin so many lines before the end; None means at the beginning.
    """
    told = {"log": str(job_dir.log), "state": str(job_dir.state), "lock": str(job_dir.lock), "follow": follow}
    offset, failures, rest = 0, 0, b""
    while True:
        try:
            with connection.far_end() as far:
                far.begin("follow", **told, offset=offset, tail=tail)
                while True:
                    frame = far.answer()
                    tail, failures = None, 0  # from here on we know our place
                    if "end" in frame:
                        break
                    # what came in part is asked for again, from the last byte that was used
                    block = far.exactly(frame["bytes"])
                    offset = frame["offset"] + len(block)
                    *lines, rest = (rest + block).split(b"\n")
                    yield from map(_readable, lines)
            if rest:
                yield _readable(rest)
            return
        except ConnectionLost:
            if failures == len(RETRY_S):
                raise
            time.sleep(RETRY_S[failures])
            failures += 1


def remote_status(connection: Connection, job_dir: JobDir) -> PodState | None:
    """What the job last knew of itself; None while it has not been heard of. Raises DataError for a damaged file."""
    return state_of(connection.ask("read", path=str(job_dir.state)), f"{connection.address}: {job_dir.state}")


def state_of(text: str | None, where: str) -> PodState | None:
    """The state in the file's `text`. Raises DataError for a damaged one."""
    from pydantic import ValidationError

    if text is None:
        return None
    try:
        return PodState.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{where}: not a job's state", str(error).splitlines()[0], "see the log") from None


@functools.cache
def _program() -> bytes:
    """Our modules for the other end, as one text: each is there under its own name for those after it."""
    texts = [(name, Path(module.__file__ or "").read_text(encoding="utf-8")) for name, module in _FAR_MODULES]
    return (
        "import sys,types\n"
        f"for name,text in {texts!r}:\n"
        " module=sys.modules[name]=types.ModuleType(name)\n"
        " exec(compile(text,name,'exec'),module.__dict__)\n"
        f"sys.exit(sys.modules[{far_end.__name__!r}].serve())\n"
    ).encode()


def _hold_open(line: Sequence[str]) -> tuple[bool, int, str]:
    """Run the ssh command `line`, whose other end is `cat`, until it ends: (whether it was up, exit code, what it said).

    Its input is ours and never comes to an end: it ends with this process, however that ends.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(line, stdin=reader, stdout=subprocess.PIPE, stderr=errors)
        finally:
            os.close(reader)
        try:
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                os.write(writer, b"\n")
            up = bool(process.stdout.read(1))  # `cat` is there, so the ports are too
            process.wait()
        finally:
            os.close(writer)
            process.terminate()
            _close(process)
        errors.seek(0)
        return up, process.returncode, errors.read().decode(errors="replace")


def _readable(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip("\r")
    # a progress bar draws over itself: its last state stands; and no log moves the cursor or names the window
    return "".join(
        letter for letter in text.rpartition("\r")[2] if letter == "\t" or category(letter) != "Cc"
    )


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    process.wait()
