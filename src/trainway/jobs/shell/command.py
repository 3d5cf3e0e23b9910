"""The command line of ssh, and what its complaints mean."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainway.errors import EnvironmentFault
from trainway.jobs.shell.host_keys import ALIAS, changed_key_fault

LOST = 255
"""Exit code of ssh when it, and not the command, has failed."""
CONNECT_S = 20
ALIVE_S = 15
"""A line on which the other end is silent for three times so long is dead."""
_WRONG_KEY = re.compile(r"HOST IDENTIFICATION HAS CHANGED|Host key verification failed|host key is known for")
_NO_LISTENING = re.compile(r"cannot listen to port: (\d+)")
_NO_LOGIN = re.compile(r"Permission denied|Too many authentication failures|no such identity|invalid format")


class ConnectionLost(EnvironmentFault):
    """The machine could not be reached, or the line was cut: it may work in a moment."""


@dataclass(frozen=True)
class Address:
    """Where a machine is, and how one logs in there."""

    host: str
    """A name, an address, or a Host of ~/.ssh/config."""
    port: int | None = None
    user: str | None = None
    key: str | None = None
    """File of the private key."""
    host_key: str | None = None
    """The machine's public key, `KIND BASE64`."""

    def __str__(self) -> str:
        return (f"{self.user}@" if self.user else "") + self.host + (f":{self.port}" if self.port else "")


def ssh_command(
    address: Address, known_hosts: Path, *, options: Sequence[str] = (), command: Sequence[str] = ()
) -> list[str]:
    """The argument list of ssh. `command` reaches the other end's shell quoted: each word stays what it is."""
    ours = [
        *options,
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        f"UserKnownHostsFile={_quoted(known_hosts)}",
        "GlobalKnownHostsFile=/dev/null",
        f"HostKeyAlias={ALIAS}",
        "UpdateHostKeys=no",
        "ForwardAgent=no",
        "ForwardX11=no",
        "PermitLocalCommand=no",
        "LogLevel=ERROR",
        f"ConnectTimeout={CONNECT_S}",
        f"ServerAliveInterval={ALIVE_S}",
        "ServerAliveCountMax=3",
    ]
    line = ["ssh"]
    for option in ours:  # the first of two that contradict each other wins
        line += ["-o", option]
    if address.key is not None:
        line += ["-o", "IdentitiesOnly=yes", "-i", _escaped(Path(address.key).expanduser())]
    if address.port is not None:
        line += ["-p", str(address.port)]
    if address.user is not None:
        line += ["-l", address.user]
    line += ["--", address.host]
    if command:
        line.append(shlex.join(command))  # the `--` above has ended the options, also for what follows
    return line


def connection_fault(address: Address, said: str, known_hosts: Path | None = None) -> EnvironmentFault:
    """The error for what ssh has written before it ended with 255."""
    if _WRONG_KEY.search(said) and known_hosts is not None:
        return changed_key_fault(str(address), known_hosts)
    reason = last_line(said) or "the line was cut"
    if _NO_LOGIN.search(said):
        return EnvironmentFault(
            f"{address} does not let us in",
            reason,
            "see that your public key is in ~/.ssh/authorized_keys there, and that ssh.user and ssh.key are right; "
            "a key with a passphrase needs ssh-agent",
        )
    if "orwarding" in said or "Address already in use" in said:
        taken = _NO_LISTENING.search(said)
        return EnvironmentFault(
            f"port {taken[1]} of 127.0.0.1 cannot be used here" if taken else "the port cannot be forwarded",
            next((line for line in said.splitlines() if line.startswith("bind ")), reason),
            "choose another port here: HERE:THERE",
        )
    return ConnectionLost(
        f"{address} cannot be reached by SSH", reason, "see that it runs and that address and port are right"
    )


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")  # ssh knows %h, %p and others in paths


def _quoted(path: Path) -> str:
    return f'"{_escaped(path)}"'  # ssh would take a blank for the end of the name
