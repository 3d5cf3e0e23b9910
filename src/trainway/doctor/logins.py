"""Logins: the Hub's token and what it may do, trackers, Git and SSH, and secrets that stand where others see them."""

from __future__ import annotations

import netrc
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from trainway.config.schema import RunConfig
from trainway.data.hub import TOKEN_VARIABLES
from trainway.data.hub_errors import is_unreachable, user_error
from trainway.doctor.findings import Finding, failure, fault, listed, ok, warning
from trainway.doctor.needs import hub_home
from trainway.doctor.network import Answer, ask, endpoint
from trainway.errors import UserError
from trainway.masking import mask_tokens
from trainway.tracking import install_command

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
WRITERS = ("admin", "write", "contributor")
"""Roles of a member that may make a repository in an organisation."""
UNREAD_NAMES = (
    "HUGGINGFACE_TOKEN",
    "HF_API_TOKEN",
    "HF_API_KEY",
    "HUGGING_FACE_TOKEN",
    "HF_KEY",
    "WANDB_KEY",
    "WANDB_TOKEN",
)
"""Names that tools of others use, and that nobody here reads."""
WANDB_HOST = "api.wandb.ai"

_TOKEN = re.compile(r"(?:hf_|rpa_|ghp_|github_pat_|wandb_v1_|sk-)[A-Za-z0-9_]{20,}")


@dataclass(frozen=True)
class Login:
    """What the Hub says of a token. `fault`: why it said nothing."""

    name: str = ""
    role: str = ""
    """read, write or fineGrained."""
    organisations: Mapping[str, str] | None = None
    """{name: the user's role in it}."""
    writable: frozenset[str] = frozenset()
    """Owners and repositories that a fine-grained token may write."""
    fault: str = ""
    refused: bool = False
    """The Hub knows no such token."""


def find_token(environ: Mapping[str, str]) -> str | None:
    """The Hub's token: of the environment, else of `hf auth login`."""
    named = next((environ[name].strip() for name in TOKEN_VARIABLES if environ.get(name, "").strip()), None)
    if named:
        return named
    place = Path(environ.get("HF_TOKEN_PATH") or hub_home(environ) / "token").expanduser()
    with suppress(OSError, UnicodeDecodeError):
        return place.read_text(encoding="utf-8").strip() or None
    return None


def probe_login(token: str, environ: Mapping[str, str]) -> Login:
    """Ask the Hub who a token is. Never fails."""
    from huggingface_hub import HfApi

    try:
        said = HfApi(endpoint=endpoint(environ), token=token).whoami()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = " ".join(str(error).split()) or type(error).__name__
        return Login(fault=text[:300], refused=status in (401, 403))
    return read_login(said)


def read_login(said: Mapping[str, Any]) -> Login:
    """The login in what `whoami` answers."""
    access = (said.get("auth") or {}).get("accessToken") or {}
    scopes = (access.get("fineGrained") or {}).get("scoped") or []
    writable = {
        str((scope.get("entity") or {}).get("name"))
        for scope in scopes
        if "repo.write" in (scope.get("permissions") or [])
    }
    return Login(
        name=str(said.get("name", "")),
        role=str(access.get("role", "")),
        organisations={str(org.get("name")): str(org.get("roleInOrg", "")) for org in said.get("orgs") or []},
        writable=frozenset(writable),
    )


def check_token(
    token: str | None, login: Login | None, environ: Mapping[str, str], *, needed: str
) -> Iterator[Finding]:
    """login: None where nobody was asked; needed: what the run takes from the Hub, in words."""
    values = {environ[name].strip() for name in TOKEN_VARIABLES if environ.get(name, "").strip()}
    if len(values) > 1:
        yield warning(
            "token",
            f"{listed([name for name in TOKEN_VARIABLES if environ.get(name)])} hold different tokens",
            f"{next(name for name in TOKEN_VARIABLES if environ.get(name))} counts",
            "unset all but HF_TOKEN",
        )
    if token is None:
        if needed:
            why = f"the run needs {needed}; what is gated or private stays closed, and downloads are slower"
            yield warning(
                "token", "there is no token of the Hub", why, "export HF_TOKEN=..., or `hf auth login`"
            )
        else:
            yield ok("token", "no token of the Hub, and none is needed")
    elif login is None:
        yield ok("token", "there is a token of the Hub (not tried)")
    elif login.refused:
        yield failure(
            "token",
            "the Hub refuses the token: it is expired, revoked or mistyped",
            login.fault,
            f"make a new one at {TOKENS_PAGE}, then `hf auth login` or export HF_TOKEN=...",
        )
    elif login.fault:
        why = "nothing is known of its rights"
        yield warning(
            "token",
            f"the token could not be tried: {login.fault}",
            why,
            "see to the network, and start the doctor again",
        )
    else:
        yield ok("token", f"the token is that of {login.name} ({login.role or 'role unknown'})")


def check_write(login: Login | None, repository: str | None, *, push: bool) -> Iterator[Finding]:
    """Whether the token may write what a push is planned to (R59). repository: OWNER/NAME, or None: the user's own."""
    if not push:
        return
    target = repository or "a repository of your own"
    if login is None or login.fault:
        yield failure(
            "token-write",
            f"a push to {target} is planned, and no valid token is there",
            "the upload at the end of the run would fail",
            f"make a token with write permission at {TOKENS_PAGE}, then `hf auth login`; or release.push_to_hub=false",
        )
    elif not may_write(login, repository):
        kind = "is read-only" if login.role == "read" else "may not write there"
        yield failure(
            "token-write",
            f"a push to {target} is planned, and the token of {login.name} {kind}",
            "the upload at the end of the run would fail",
            f"make a token with write permission to {target} at {TOKENS_PAGE}; or release.push_to_hub=false",
        )
    else:
        yield ok("token-write", f"the token may write {target}")


def check_push(config: RunConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a planned release can go where it is meant to; nothing is made there."""
    from trainway.release.readiness import is_done, prove_push

    if is_done(config):
        yield ok("push", "the run is done: `trainway release` says what is there of it")
        return
    try:
        prove_push(config, environ, make=False)
    except UserError as error:
        yield fault("push", error)
    else:
        yield ok("push", f"{config.release.repo} can take the release {config.release.tag}")


def may_write(login: Login, repository: str | None) -> bool:
    owner = repository.partition("/")[0] if repository else login.name
    if login.role == "fineGrained":
        return bool({owner, repository} & login.writable)
    member = (login.organisations or {}).get(owner, "")
    return login.role == "write" and (owner == login.name or member in WRITERS)


def check_access(
    name: str, token: str | None, environ: Mapping[str, str], kind: Literal["model", "dataset"] = "model"
) -> Iterator[Finding]:
    """Whether a model or dataset may be downloaded: of a gated one the terms must have been accepted."""
    from huggingface_hub import HfApi

    try:
        HfApi(endpoint=endpoint(environ), token=token or False).auth_check(name, repo_type=kind)
    except Exception as error:
        if is_unreachable(error):
            return  # said of the Hub already
        yield fault("access", user_error(name, error, kind=kind))
    else:
        yield ok("access", f"the {kind} {name} may be downloaded")


def check_trackers(
    report_to: Iterable[str], environ: Mapping[str, str], find: Callable[[str], object]
) -> Iterator[Finding]:
    """Whether the trackers are installed and logged in to. find: as importlib.util.find_spec."""
    for name in report_to:
        if name == "tensorboard":  # files beside the run: nothing to log in to
            continue
        if find(name) is None:
            yield failure(
                name,
                f"tracking.report_to names {name}, which is not installed",
                "the run would be refused",
                install_command([name]),
            )
        elif name == "wandb":
            yield from _check_wandb(environ)
        elif name == "mlflow":
            yield from _check_mlflow(environ, find, ask)
        else:
            yield from _check_trackio(environ, ask)


def check_git(environ: Mapping[str, str], home: Path) -> Iterator[Finding]:
    """Whether the training code can be fetched: Git, and an SSH key (R2)."""
    if shutil.which("git", path=environ.get("PATH")) is None:
        why = "the training code comes from a repository, and a run notes the commit that it was"
        yield failure("git", "Git is not installed", why, "apt-get install -y git")
    else:
        yield ok("git", "Git is installed")
    keys = sorted(path.name for path in (home / ".ssh").glob("id_*.pub"))
    if keys or environ.get("SSH_AUTH_SOCK"):
        yield ok("ssh-key", f"SSH: {listed(keys) or 'an agent'}")
    else:
        yield warning(
            "ssh-key",
            f"there is no SSH key in {home / '.ssh'}",
            "a private repository cannot be cloned over SSH",
            "ssh-keygen -t ed25519 -N '' -f ~/.ssh/id_ed25519, and give ~/.ssh/id_ed25519.pub to the Git host",
        )


def probe_command_lines() -> list[tuple[int, Sequence[str]]]:
    """(pid, words) of this user's processes."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "uids"]):
        words, uids = process.info["cmdline"], process.info["uids"]
        if words and uids and uids.real == os.getuid():
            found.append((process.info["pid"], words))
    return found


def check_secrets(
    command_lines: Iterable[tuple[int, Sequence[str]]], environ: Mapping[str, str]
) -> Iterator[Finding]:
    """Tokens that everyone on the machine can read, and those under a name that nobody reads. No value is repeated."""
    shown = [
        f"{pid} ({Path(words[0]).name})"
        for pid, words in command_lines
        if any(_TOKEN.search(word) for word in words)
    ]
    if shown:
        yield warning(
            "secrets",
            f"a token stands on the command line of process {listed(shown)}",
            "every user of the machine reads it in the process list, and the shell keeps it in its history",
            f"hand it over in the environment (export HF_TOKEN=...), and revoke this one at {TOKENS_PAGE}",
        )
    unread = [name for name in UNREAD_NAMES if environ.get(name)]
    if unread and not any(environ.get(name) for name in TOKEN_VARIABLES):
        right = "WANDB_API_KEY" if unread[0].startswith("WANDB") else "HF_TOKEN"
        yield warning(
            "secrets",
            f"{listed(unread)} is set, which nothing here reads",
            f"the name is {right}",
            f'export {right}="${unread[0]}"',
        )
    named = [_TOKEN.sub("***", name) for name in environ if _TOKEN.search(name)]
    if named:
        yield warning(
            "secrets",
            "a token is the name of an environment variable",
            "names are shown by programs that hide values",
            "unset it, write `export HF_TOKEN=...` with the token after the equals sign, and revoke this one",
        )
    if not shown and not unread and not named:
        yield ok("secrets", "no token stands on a command line of yours")


def _check_wandb(environ: Mapping[str, str]) -> Iterator[Finding]:
    mode = environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        yield ok("wandb", f"Weights & Biases: WANDB_MODE is {mode}, so no login is needed")
    elif environ.get("WANDB_API_KEY") or _has_netrc(environ):
        yield ok("wandb", "Weights & Biases: there is a key")
    else:
        yield failure(
            "wandb",
            "tracking.report_to names wandb, and there is no key",
            "it would take nothing of the run",
            "export WANDB_API_KEY=... or `wandb login`; WANDB_MODE=offline keeps everything here",
        )


def _has_netrc(environ: Mapping[str, str]) -> bool:
    host = urlsplit(environ.get("WANDB_BASE_URL", "")).hostname or WANDB_HOST
    place = Path(environ.get("NETRC") or Path(environ.get("HOME") or "~") / ".netrc").expanduser()
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(place).authenticators(host) is not None
    return False


def _check_mlflow(
    environ: Mapping[str, str], find: Callable[[str], object], asked: Callable[[str], Answer]
) -> Iterator[Finding]:
    uri = environ.get("MLFLOW_TRACKING_URI", "")
    if uri == "databricks" or uri.startswith(("databricks://", "databricks-uc")):
        yield ok("mlflow", f"MLflow: {uri}, with the login of Databricks' own tools")
        return
    if not uri.startswith(("http://", "https://")):
        yield from _check_mlflow_store(uri, find)
        return
    answer = asked(f"{uri.rstrip('/')}/health")
    host = urlsplit(uri).netloc.rpartition("@")[2]
    if answer.status in (401, 403):
        yield failure(
            "mlflow",
            f"the MLflow server {host} refuses the login",
            f"status {answer.status}",
            "export MLFLOW_TRACKING_USERNAME=... and MLFLOW_TRACKING_PASSWORD=..., or MLFLOW_TRACKING_TOKEN=...",
        )
    elif answer.fault or answer.status >= 500:
        yield failure(
            "mlflow",
            f"the MLflow server {host} cannot be reached",
            answer.fault or f"status {answer.status}",
            "see that it runs and that MLFLOW_TRACKING_URI is right (through `ssh -L` where it is private)",
        )
    else:
        yield ok("mlflow", f"the MLflow server {host} answers")


def _check_mlflow_store(uri: str, find: Callable[[str], object]) -> Iterator[Finding]:
    kind, separator, _ = uri.partition("://")
    database = not uri or (separator and kind not in ("file", "dbfs", "s3"))
    if database and (missing := [name for name in ("sqlalchemy", "alembic") if find(name) is None]):
        yield failure(
            "mlflow",
            f"MLflow keeps the run in a database, which needs {' and '.join(missing)}",
            "it would take nothing of the run",
            f"{install_command(['mlflow'])}, or set MLFLOW_TRACKING_URI to a server",
        )
        return
    place = "the working directory" if not uri else mask_tokens(uri)
    yield ok("mlflow", f"MLflow keeps its files in {place}")


def _check_trackio(environ: Mapping[str, str], asked: Callable[[str], Answer]) -> Iterator[Finding]:
    server, space = environ.get("TRACKIO_SERVER_URL", ""), environ.get("TRACKIO_SPACE_ID", "")
    if space and find_token(environ) is None:
        yield failure(
            "trackio",
            f"TRACKIO_SPACE_ID is {space}, and there is no token of the Hub",
            "the Space would take nothing of the run",
            "export HF_TOKEN=... or `hf auth login`; without TRACKIO_SPACE_ID everything stays here",
        )
    elif server and not space:
        host = urlsplit(server).netloc.rpartition("@")[2]
        answer = asked(server.partition("?")[0])  # what follows is a token
        if answer.fault or answer.status >= 500:
            yield failure(
                "trackio",
                f"the Trackio server {host} cannot be reached",
                answer.fault or f"status {answer.status}",
                "see that it runs and that TRACKIO_SERVER_URL is right",
            )
        else:
            yield ok("trackio", f"the Trackio server {host} answers")
    else:
        yield ok(
            "trackio",
            f"Trackio writes to {f'the Space {space}' if space else 'its database on this machine'}",
        )
