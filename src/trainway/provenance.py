"""Where a run comes from: code, versions, machine, command line. Secrets never get in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainway.masking import mask_secrets

PACKAGES = ("trainway", "torch", "transformers", "tokenizers", "safetensors", "numpy")
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
