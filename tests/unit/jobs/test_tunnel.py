"""`trainway tunnel` over a real sshd: what listens there answers on 127.0.0.1 here, and nowhere else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from tests.servers import tcp_server
from tests.sshd import Server, needs_sshd, new_server, plain_environment
from trainway.jobs.record import Record, new_record, records_dir, save_record
from trainway.jobs.shell.host_keys import pin_host_key


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    needs_sshd()
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "known"))
    made = new_server(tmp_path / "sshd", plain_environment(tmp_path / "home"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def record(server: Server, tmp_path: Path) -> Record:
    """A job that is up at the server."""
    address = server.address
    place = {"host": address.host, "port": address.port, "user": address.user, "key": address.key}
    made = new_record("try", "ssh", phase="up", root=str(tmp_path / "home"), place={**place, "save_s": 1.0})
    save_record(made)
    pin_host_key(records_dir() / "try.known_hosts", server.host_key)
    return made


def shouting() -> AbstractContextManager[int]:
    """A server of TCP that answers in capitals."""
    return tcp_server(bytes.upper)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def tunnel(*ports: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "trainway", "tunnel", "try", *ports]
    # a shell that runs this suite in its background has SIGINT ignored, and so would its children
    return subprocess.Popen(
        words, env=os.environ, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def ask(port: int) -> bytes:
    """What comes back from there; nothing while there is no way."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(b"who are you?")
            return line.recv(100)
    except OSError:
        return b""


def until_answered(port: int, process: subprocess.Popen[str]) -> bytes:
    end = time.monotonic() + 120
    while not (answer := ask(port)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    return answer


def until_closed(port: int) -> None:
    end = time.monotonic() + 60
    while listeners(port):
        assert time.monotonic() < end, "the port is still open"
        time.sleep(0.05)


def listeners(port: int) -> set[str]:
    """The addresses of this machine on which `port` takes connections."""
    found = psutil.net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


def test_what_listens_there_answers_here_and_a_cut_line_is_made_again(server: Server, record: Record) -> None:
    here, again = free_port(), free_port()
    with shouting() as there:
        process = tunnel(f"{here}:{there}", f"{again}:{there}")
        try:
            assert until_answered(here, process) == b"WHO ARE YOU?"
            assert ask(again) == b"WHO ARE YOU?"
            assert listeners(here) == listeners(again) == {"127.0.0.1"}
            assert server.cut() > 0
            assert until_answered(here, process) == b"WHO ARE YOU?"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.splitlines() == [
        f"http://127.0.0.1:{port} is port {there} of 127.0.0.1; Ctrl-C ends it" for port in (here, again)
    ]
    assert listeners(here) == set()


def test_a_tunnel_ends_with_its_process_even_when_that_is_killed(server: Server, record: Record) -> None:
    here = free_port()
    with shouting() as there:
        process = tunnel(f"{here}:{there}")
        try:
            assert until_answered(here, process)
        finally:
            process.kill()
            process.communicate()
    until_closed(here)


def test_a_port_that_is_taken_here_is_named(server: Server, record: Record) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = tunnel(f"{port}:80")
        try:
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 4
    assert f"error: port {port} of 127.0.0.1 cannot be used here\n" in said
    assert "Address already in use" in said and "fix: choose another port here: HERE:THERE" in said


def test_a_machine_that_is_off_is_said_at_once(server: Server, record: Record) -> None:
    server.stop()
    process = tunnel(str(free_port()))
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 4
    assert "cannot be reached by SSH" in said and "Connection refused" in said
