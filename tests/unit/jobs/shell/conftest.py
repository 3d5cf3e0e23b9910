"""A real sshd on 127.0.0.1, and a connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sshd import Server, needs_sshd, new_server, plain_environment
from trainway.jobs.shell.connection import Connection


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    needs_sshd()
    made = new_server(tmp_path / "sshd", plain_environment(tmp_path / "home"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def connection(server: Server, tmp_path: Path) -> Connection:
    return Connection(server.address, tmp_path / "it's a % home" / "known_hosts")
