"""Where a run comes from: code, versions, machine, command line. Secrets never get in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("trainway", "torch", "transformers", "tokenizers", "safetensors", "numpy")
MASK = "***"
GIT_TIMEOUT_S = 3.0


def collect_provenance(config_hash: str, data_hash: str, argv: Sequence[str]) -> dict[str, Any]:
    """What to write beside a run so that it can be explained and repeated; JSON values only. Never fails.

    `git.trainway` is the checkout that the package runs from, `git.project` that of the working directory; each
    {commit, dirty} or None.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_hash": config_hash,
        "data_hash": data_hash,
        "argv": mask_secrets(argv),
        "git": {"trainway": _package_git(), "project": _git_state(Path.cwd())},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": _usable_cores()},
        "hostname": socket.gethostname(),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """32 hex digits of sha256 over the configuration as JSON; the order of keys does not matter.

    Raises ValueError for NaN or infinity and TypeError for what JSON does not know.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def mask_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with values that look like secrets replaced by ***."""
    masked = []
    awaiting = False  # `--hf-token VALUE`: the value is the next argument
    for argument in argv:
        if awaiting and not argument.startswith("--"):
            masked.append(MASK)
            awaiting = False
            continue
        awaiting = bool(_FLAG.fullmatch(argument))
        masked.append(_mask(argument))
    return masked


def mask_tokens(text: str) -> str:
    """A text with logins in URLs, bearer tokens and tokens of known kinds replaced by ***; prose stays as it is."""
    text = _URL_LOGIN.sub(rf"\1{MASK}@", text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _KNOWN.sub(MASK, text)


def secret_values(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the environment's variables with a secret's name hold, the longest first: one may hold another. No paths, and
    nothing so short that it stands in a text by chance."""
    values = {value.strip() for name, value in environ.items() if _SECRET_VARIABLE.fullmatch(name)}
    found = [value for value in values if len(value) >= SHORTEST_SECRET and not value.startswith("/")]
    return sorted(found, key=lambda value: (-len(value), value))


def hide_secrets(text: str, values: Iterable[str] | None = None) -> str:
    """A text with tokens of known kinds, and these values, replaced by ***; None: those of this process's secrets."""
    for value in secret_values() if values is None else values:
        text = text.replace(value, MASK)
    return mask_tokens(text)


SHORTEST_SECRET = 8
_SECRET_VARIABLE = re.compile(
    r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY|KEY_ID|AUTHORIZATION)", re.IGNORECASE
)
# A setting whose last word is a secret's name: hf_token=, --wandb.api-key=. Not max_tokens=, not tokenizer.path=.
_SECRET_NAME = (
    r"[\w.\-]*(?:token|secret|passw(?:or)?d|passphrase|credentials?|apikey|(?<![a-z])key|authorization)"
)
_FLAG = re.compile(rf"--?{_SECRET_NAME}", re.IGNORECASE)
_SETTING = re.compile(rf"(-{{0,2}}{_SECRET_NAME}=).+", re.IGNORECASE | re.DOTALL)
_INSIDE = re.compile(
    rf"""((?<![\w.\-]){_SECRET_NAME}["']?\s*[:=]\s*)("[^"]*"|'[^']*'|[^\s,}}]+)""", re.IGNORECASE
)
_URL_LOGIN = re.compile(r"(://)[^/\s@]+@")
_BEARER = re.compile(r"(bearer\s+)\S+", re.IGNORECASE)
_KNOWN = re.compile(
    r"(?:hf_|ghp_|gho_|ghs_|github_pat_|glpat-|sk-|rpa_|xox[abprs]-|AKIA|ASIA|AIza|wandb_v1_|npm_|pypi-|ya29\.|eyJ)"
    r"[\w.\-]{12,}"
)


def _mask(argument: str) -> str:
    if match := _SETTING.fullmatch(argument):
        return match[1] + MASK
    return _INSIDE.sub(rf"\1{MASK}", mask_tokens(argument))


def _package_git() -> dict[str, Any] | None:
    # an installed package may lie in the virtual environment of somebody else's repository: only a tracked file counts
    here = Path(__file__).resolve()
    return _git_state(here.parent) if _git(here.parent, "ls-files", "--error-unmatch", here.name) else None


def _git_state(directory: Path) -> dict[str, Any] | None:
    commit = _git(directory, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    # core.fsmonitor names a program to run, and a repository that one merely stands in could name any
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    # a container may be given fewer cores than the machine has
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
