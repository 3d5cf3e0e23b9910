"""Commands and logs over a real sshd: words stay words, the key is pinned, a cut line loses nothing."""

from __future__ import annotations

import socket
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.sshd import Server
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.orders import JobDir
from trainway.jobs.shell import connection as module
from trainway.jobs.shell.command import Address, ConnectionLost, connection_fault, ssh_command
from trainway.jobs.shell.connection import Connection, remote_logs, remote_status
from trainway.jobs.shell.host_keys import (
    fingerprint,
    pin_host_key,
    pinned_host_key,
    read_host_key,
    scan_host_key,
)

EVIL = "$(touch x);'\"\n`id` ${HOME} \\ * ~ !! | & > x"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB"


def test_words_reach_the_other_end_as_they_are(connection: Connection, tmp_path: Path) -> None:
    done = connection.run(["printf", "%s|", EVIL, "", "b c", "-n"])
    assert done.returncode == 0
    assert done.stdout.decode() == f"{EVIL}||b c|-n|"
    assert connection.run(["cat"], input=EVIL.encode()).stdout.decode() == EVIL
    assert connection.run(["sh", "-c", "echo no >&2; exit 7"]).returncode == 7
    assert list(connection.stream(["seq", "3"])) == ["1", "2", "3"]
    assert not list((tmp_path / "home").iterdir())
    with pytest.raises(EnvironmentFault, match="`sh` failed"):
        list(connection.stream(["sh", "-c", "exit 7"]))


def test_a_changed_host_key_is_refused_and_nothing_is_sent(server: Server, connection: Connection) -> None:
    assert scan_host_key("127.0.0.1", server.port) == server.host_key
    assert connection.run(["true"]).returncode == 0
    pinned = server.host_key
    server.stop()
    server.new_host_key()
    server.start()
    with pytest.raises(EnvironmentFault, match="another host key") as refused:
        connection.run(["touch", "came"])
    assert fingerprint(pinned) in refused.value.why
    assert not isinstance(refused.value, ConnectionLost)  # which would be tried again
    assert str(connection.known_hosts) in refused.value.fix
    # the user's word for the new key is the only way on
    again = Connection(server.address, connection.known_hosts)
    assert again.run(["true"]).returncode == 0


def test_without_a_pinned_key_nothing_is_sent(server: Server, tmp_path: Path) -> None:
    address = Address("127.0.0.1", server.port, server.address.user, server.address.key)
    with pytest.raises(EnvironmentFault, match="another host key"):
        Connection(address, tmp_path / "nothing").run(["true"])


def test_a_port_that_nobody_listens_at_is_a_lost_connection(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionLost, match="cannot be reached"):
        Connection(Address("127.0.0.1", port, host_key=KEY), tmp_path / "known").run(["true"])


def test_a_login_that_is_refused_is_not_tried_again() -> None:
    fault = connection_fault(Address("a"), "me@a: Permission denied (publickey).\n")
    assert not isinstance(fault, ConnectionLost)
    assert fault.why == "me@a: Permission denied (publickey)."


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", "$(touch x)", "", "a;b", "a\nb"])
def test_what_is_no_host_never_reaches_ssh(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the name of a host"):
        Connection(Address(host), tmp_path / "known")
    with pytest.raises(ConfigError, match="not the name of a user"):
        Connection(Address("a", user=f"-{host}"), tmp_path / "known")


def test_the_command_line_asks_nothing_and_forwards_nothing(tmp_path: Path) -> None:
    line = ssh_command(Address("h", 2200, "u", "~/k%d"), tmp_path / "a b%", command=["echo", "a b"])
    options = {value for name, value in pairwise(line) if name == "-o"}
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ForwardAgent=no", "IdentitiesOnly=yes"} <= options
    assert f'UserKnownHostsFile="{tmp_path}/a b%%"' in options
    assert line[-2:] == ["h", "echo 'a b'"]
    assert line[line.index("-i") + 1] == str(Path("~/k%%d").expanduser())


def test_host_keys_are_read_as_they_are_printed(tmp_path: Path) -> None:
    assert read_host_key(KEY) == read_host_key(f"[h]:22 {KEY} me@h\n") == KEY
    for wrong in ("", "ssh-ed25519", "ssh-ed25519 !!!!", "ssh-rsa " + KEY.split()[1], "ssh-dss AAAA"):
        with pytest.raises(ConfigError, match="not a public key"):
            read_host_key(wrong)
    file = tmp_path / "new" / "known"
    assert pinned_host_key(file) is None
    pin_host_key(file, KEY)
    assert pinned_host_key(file) == KEY
    assert fingerprint(KEY).startswith("SHA256:") and len(fingerprint(KEY)) == 50


def test_logs_survive_cuts_without_losing_or_repeating_a_line(
    server: Server, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", (0.1,) * 50)
    job = JobDir.of(tmp_path / "root", "a")
    job.path.mkdir(parents=True)
    job.state.write_text('{"stage": "train"}')
    wanted = [f"line {number} é" for number in range(300)] + ["\tthe end"]
    cuts = []

    def write() -> None:
        import fcntl

        with job.lock.open("w") as lock, job.log.open("wb") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = ("\n".join(wanted) + "\n").encode()
            for start in range(0, len(text), 37):  # in the middle of lines and of letters
                log.write(text[start : start + 37])
                log.flush()
                if start % (37 * 30) == 0:
                    end = time.monotonic() + 60
                    while not (cut := server.cut()) and time.monotonic() < end:
                        time.sleep(0.05)
                    cuts.append(cut)
            job.state.write_text('{"stage": "ended"}')

    writer = threading.Thread(target=write)
    writer.start()
    seen = list(remote_logs(connection, job, follow=True, tail=None))
    writer.join()
    assert seen == wanted
    assert len(cuts) >= 3 and all(cuts)
    assert list(remote_logs(connection, job, follow=False, tail=2)) == wanted[-2:]


def test_logs_of_a_supervisor_that_died_come_to_an_end_and_move_no_cursor(
    connection: Connection, tmp_path: Path
) -> None:
    job = JobDir.of(tmp_path / "root", "a")
    assert list(remote_logs(connection, job, follow=False, tail=None)) == []
    assert remote_status(connection, job) is None
    job.path.mkdir(parents=True)
    job.state.write_text('{"job": "a", "stage": "train", "began": 1.0, "updated": 2.0, "step": 7}')
    job.lock.touch()
    job.log.write_bytes(b"10%\r50%\r100%\r\n\x1b]0;evil\x07red\xff\nno end")
    assert list(remote_logs(connection, job, follow=True, tail=None)) == [
        "100%",
        "]0;evilred\ufffd",
        "no end",
    ]
    state = remote_status(connection, job)
    assert state is not None and state.step == 7
