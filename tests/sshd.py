"""A real sshd on 127.0.0.1 with keys of its own, as the user who runs the tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trainway.jobs.shell.command import Address

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@dataclass
class Server:
    """An sshd and what is needed to get in."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    environment: tuple[str, ...] = ()
    """NAME=VALUE of the sessions."""

    @property
    def host_key(self) -> str:
        kind, blob, *_ = (self.folder / "host.pub").read_text().split()
        return f"{kind} {blob}"

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port, getpass.getuser(), str(self.folder / "user"), self.host_key)

    def start(self) -> None:
        (self.folder / "authorized").write_bytes((self.folder / "user.pub").read_bytes())
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.folder / 'host'}",
            f"AuthorizedKeysFile {self.folder / 'authorized'}",
            f"PidFile {self.folder / 'sshd.pid'}",
            "StrictModes no",  # /tmp is writable by everybody
            "UsePAM no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            *([f"SetEnv {' '.join(self.environment)}"] if self.environment else []),
        ]
        (self.folder / "config").write_text("\n".join(lines) + "\n")
        assert SSHD is not None
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.folder / "config")], stderr=log)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (self.folder / "sshd.log").read_text()
            time.sleep(0.02)
        raise AssertionError("sshd does not listen")

    def stop(self) -> None:
        """The server and every session of it, at once: as a machine that loses its network."""
        if self.process is not None:
            self.cut()
            self.process.kill()
            self.process.wait()
            self.process = None

    def cut(self) -> int:
        """Kill the open sessions' sshd processes, not what they have started; how many there were."""
        assert self.process is not None
        cut = 0
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                if child.name().startswith("sshd"):
                    child.kill()
                    cut += 1
        return cut

    def new_host_key(self) -> None:
        make_key(self.folder / "host")


def make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def new_server(folder: Path, environment: tuple[str, ...] = ()) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # for its separated privileges
    for name in ("host", "user"):
        make_key(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Server(folder, port, environment=environment)


def needs_sshd() -> None:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd or ssh is not installed")


def plain_environment(home: Path, **more: str) -> tuple[str, ...]:
    """A home of its own, so that no file of the user's has a part in it."""
    home.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    values = {"HOME": str(home), "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
    return tuple(f"{name}={value}" for name, value in values.items())
