"""Which machine is the right one: its host key, asked for once, kept in a file of the job's own, and never swapped."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

from trainway.errors import ConfigError, EnvironmentFault
from trainway.files import atomic_write

ALIAS = "trainway-job"
"""The name that stands for the machine in the file: address and port of a rented one change, its key does not."""
_KIND = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)|sk-[a-z0-9-]+@openssh\.com)")


def read_host_key(line: str) -> str:
    """`KIND BASE64` of a line such as `ssh-keyscan` prints it, with or without host and comment.

    Raises ConfigError when there is no public key in it.
    """
    words = line.split()
    for kind, blob in pairwise(words):
        if _KIND.fullmatch(kind) and _blob(kind, blob) is not None:
            return f"{kind} {blob}"
    raise ConfigError(
        "the host key is not a public key",
        "expected is e.g. `ssh-ed25519 AAAA...`, on one line",
        "copy it from /etc/ssh/ssh_host_ed25519_key.pub of the machine",
    )


def fingerprint(host_key: str) -> str:
    """SHA256:... as `ssh-keygen -l` shows it."""
    kind, blob = host_key.split()
    digest = hashlib.sha256(_blob(kind, blob) or b"").digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def pin_host_key(known_hosts: Path, host_key: str) -> None:
    """Make `host_key` the only one that `known_hosts` accepts."""
    wanted = f"{ALIAS} {read_host_key(host_key)}\n"
    if not known_hosts.is_file() or known_hosts.read_text(encoding="utf-8") != wanted:
        known_hosts.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(known_hosts, wanted)


def pinned_host_key(known_hosts: Path) -> str | None:
    """The key that was pinned, or None. Raises ConfigError for a file that is damaged."""
    if not known_hosts.is_file():
        return None
    return read_host_key(known_hosts.read_text(encoding="utf-8"))


def scan_host_key(host: str, port: int | None = None) -> str:
    """The public key that the machine shows now, as `KIND BASE64`. No login is tried.

    Who answers is taken at its word: to be called once, and pinned. It goes the way that `ssh` would, over the
    jump hosts of ~/.ssh/config too. Raises EnvironmentFault when nothing answers.
    """
    from trainway.jobs.shell.command import Address, connection_fault, ssh_command

    with tempfile.TemporaryDirectory(prefix="trainway-") as folder:
        found = Path(folder) / "known_hosts"
        address = Address(host, port)
        # `none` is refused by every server, after it has shown its key
        options = ["StrictHostKeyChecking=accept-new", "PreferredAuthentications=none", "HashKnownHosts=no"]
        command = ssh_command(address, found, options=options, command=["true"])
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if found.is_file():
            return read_host_key(found.read_text(encoding="utf-8"))
    raise connection_fault(address, done.stderr.decode(errors="replace"))


def changed_key_fault(where: str, known_hosts: Path) -> EnvironmentFault:
    """The error for a machine that shows another key than the pinned one."""
    try:
        pinned = pinned_host_key(known_hosts)
    except ConfigError:
        pinned = None
    why = f"pinned is {fingerprint(pinned)}" if pinned else "none is pinned"
    return EnvironmentFault(
        f"{where} shows another host key than the one pinned for this job",
        f"{why}; somebody may stand between, or the machine was set up anew; nothing was sent",
        f"ask the machine's owner; if the new key is right, put it into ssh.host_key, or remove {known_hosts}",
    )


def _blob(kind: str, text: str) -> bytes | None:
    """The key's bytes where they are well-formed and of that kind."""
    try:
        blob = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    name = kind.encode()
    return blob if blob[:4] == len(name).to_bytes(4, "big") and blob[4 : 4 + len(name)] == name else None
