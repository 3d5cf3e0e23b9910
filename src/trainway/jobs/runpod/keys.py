"""The SSH key that a pod lets in: Trainway's own on this machine, and its public half at the account."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pydantic import ValidationError

from trainway.errors import EnvironmentFault
from trainway.jobs.record import Record
from trainway.jobs.runpod.api import Api
from trainway.jobs.runpod.models import SetKeys
from trainway.jobs.target import Say
from trainway.planning.measured import state_dir


def key_file() -> Path:
    """Trainway's own private key on this machine, made once. Raises EnvironmentFault when none can be made."""
    path = state_dir() / "ssh" / "id_ed25519"
    if not path.is_file() or not path.with_name(path.name + ".pub").is_file():
        _make(path)
    return path


def public_key(path: Path) -> str:
    """One line: type, key, comment."""
    return path.with_name(path.name + ".pub").read_text(encoding="utf-8").strip()


def register(api: Api, public: str, say: Say) -> None:
    """Have the account's pods let the key in from now on; the keys that are there stay.

    Raises EnvironmentFault when one that is there could not be sent back as it is.
    """
    known = api.ssh_keys()
    if _body(public) in {_body(key) for key in known}:
        return
    kept = [key.strip() for key in known if key.strip()]
    try:
        body = SetKeys(keys=(*kept, public))
    except ValidationError:
        raise EnvironmentFault(
            "the SSH key is not registered at RunPod",
            "the account holds a key of another form, which replacing the set would drop",
            f"add this one by hand at console.runpod.io, Settings: {public}",
        ) from None
    now = {_body(key) for key in api.set_ssh_keys(body)}
    if missing := [key for key in body.keys if _body(key) not in now]:
        raise EnvironmentFault(
            "RunPod has not kept all SSH keys",
            f"{len(missing)} are missing",
            "see console.runpod.io, Settings",
        )
    say("the SSH key of this machine is registered at RunPod")


def check_account(api: Api, record: Record) -> None:
    """Raise EnvironmentFault when the account is not known to be the one that the job is of.

    Another account answers 404 for a pod that goes on billing at its own. `up` has registered this machine's SSH key
    before it asked for anything: an account that does not hold it is another one.
    """
    path = record.place.get("ssh_key")
    if path is None:  # it never came to asking for a machine
        return
    try:
        ours = _body(public_key(Path(path)))
    except OSError:
        return
    if ours not in {_body(key) for key in api.ssh_keys()}:
        raise EnvironmentFault(
            f"RUNPOD_API_KEY may be of another account than job {record.name}",
            "the SSH key that `up` has registered is not at this one, so its word that nothing is there counts for nothing",
            f"set the key of the account that it was started with; or, once console.runpod.io shows that it is gone: "
            f"`trainway down {record.name} --forget`",
        )


def _body(key: str) -> tuple[str, ...]:
    """Type and key, without the comment."""
    return tuple(key.split()[:2])


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    # a name of its own for each process: two that start at once end up with one whole pair or the other
    made = path.with_name(f"{path.name}.{os.getpid()}")
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "trainway", "-f", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFault(
            "no SSH key can be made", f"ssh-keygen: {type(error).__name__}", "install OpenSSH's client"
        ) from None
    os.replace(f"{made}.pub", f"{path}.pub")
    os.replace(made, path)
