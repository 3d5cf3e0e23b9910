"""A machine made ready from an installed Trainway: a key, the training repository, its data, and what a look shows.

What `scripts/bootstrap.sh` does for a machine that has nothing yet; packages and Python are there already.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainway.errors import ConfigError, DataError, EnvironmentFault

CLONE_S = 1800.0


@dataclass
class Ready:
    """What was found, what was made, and what to do next."""

    public_key: str
    key_path: Path
    key_made: bool
    directory: Path | None = None
    commit: str = ""
    changed: list[str] = field(default_factory=list)
    """What this call has made or moved on; empty when everything was there."""
    next: str = ""
    """The next command."""


def bootstrap(
    repo: str | None = None,
    *,
    ref: str | None = None,
    directory: Path | None = None,
    data: Sequence[Path] = (),
    config: str | None = None,
    settings: Sequence[str] = (),
    home: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Ready:
    """Make a key, clone or pull, see that the data is there, and look whether the run can start. Running it again
    changes nothing.

    Args:
        repo: address of the training repository; None leaves it out.
        ref: branch, tag or commit; None means the repository's own.
        directory: where the clone is; None means by the repository's name, here.
        data: files and directories that must be there, seen from the clone or from here.
        config: the run that is meant for this machine, for the doctor's quick checks.

    Raises:
        ConfigError: the address or the reference cannot be one, or the directory is something else.
        DataError: data is missing; all of it is named, and nothing is made in its place.
        EnvironmentFault: Git or ssh-keygen is missing or fails, or the run could not start.
    """
    ready = _key(home or Path.home())
    if ready.key_made:
        ready.changed.append(f"made {ready.key_path}")
    if repo is not None:
        _repository(ready, repo, ref, directory, environ)
    elif ref is not None or directory is not None:
        raise ConfigError(
            "--ref or --dir is given without --repo", "they are about a repository", "add --repo URL"
        )
    where = ready.directory or Path.cwd()
    _check_data(data, where)
    words = ["trainway", "train", config, *settings, "--dry-run"] if config else ["trainway", "doctor"]
    if config is not None:
        with contextlib.chdir(where):  # where the next command is to be run
            _look(config, settings, environ)
    move = f"cd {shlex.quote(str(where))} && " if ready.directory else ""
    ready.next = move + shlex.join(words)
    return ready


def _key(home: Path) -> Ready:
    path = home / ".ssh" / "id_ed25519"
    public = path.with_name("id_ed25519.pub")
    made = not path.exists()
    if made:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        comment = f"trainway-{os.uname().nodename}"
        _run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], "openssh-client"
        )
    if not public.exists():
        public.write_text(_run(["ssh-keygen", "-y", "-P", "", "-f", str(path)], "openssh-client"))
    return Ready(public.read_text().strip(), path, made)


def _repository(
    ready: Ready, repo: str, ref: str | None, directory: Path | None, environ: Mapping[str, str]
) -> None:
    for name, value in (("--repo", repo), ("--ref", ref or "")):
        if value.startswith("-"):
            raise ConfigError(f"{name} is {value!r}", "Git would take it for an option", "correct it")
    # an address by which Git would run a command of its own choosing
    quiet = {**environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh"}
    name = repo.rstrip("/").replace(":", "/").rpartition("/")[2].removesuffix(".git")
    place = (directory or Path(name or "repository")).absolute()

    def git(*words: str) -> str:
        return _run(["git", *words], "git", quiet, key=ready.key_path).strip()

    before = ""
    if (place / ".git").exists():
        origin = git("-C", str(place), "remote", "get-url", "origin")
        if origin != repo:
            raise ConfigError(f"{place} is a clone of {origin}", f"--repo is {repo}", "choose another --dir")
        before = git("-C", str(place), "rev-parse", "HEAD")
        git("-C", str(place), "fetch", "-q", "--tags", "origin")
    elif place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(
            f"{place} is there and no clone",
            "nothing is overwritten",
            "choose another --dir, or move it away",
        )
    else:
        git("clone", "-q", "--", repo, str(place))
    branch = ref is None or _knows(place, f"refs/remotes/origin/{ref}", quiet)
    if ref is not None:
        git("-C", str(place), "-c", "advice.detachedHead=false", "checkout", "-q", ref, "--")
    if before and branch:
        git("-C", str(place), "merge", "-q", "--ff-only", f"origin/{ref}" if ref else "@{upstream}")
    ready.directory, ready.commit = place, git("-C", str(place), "rev-parse", "HEAD")
    if ready.commit != before:
        ready.changed.append(f"{place} is at {ready.commit}")


def _knows(place: Path, name: str, environ: Mapping[str, str]) -> bool:
    words = ["git", "-C", str(place), "rev-parse", "-q", "--verify", name]
    return subprocess.run(words, env=dict(environ), capture_output=True).returncode == 0


def _check_data(data: Sequence[Path], where: Path) -> None:
    missing = [str(path) for path in data if not (where / path).exists()]
    if missing:
        raise DataError(
            f"missing: {', '.join(missing)}",
            f"looked for from {where}",
            "bring the files here, and start again",
        )


def _look(config: str, settings: Sequence[str], environ: Mapping[str, str]) -> None:
    from trainway.config.load import load_config
    from trainway.doctor.checks import cheap_checks
    from trainway.doctor.findings import failures

    if wrong := failures(cheap_checks(load_config(config, settings).config, environ)):
        raise EnvironmentFault(
            "; ".join(finding.what for finding in wrong),
            "; ".join(dict.fromkeys(finding.why for finding in wrong if finding.why)),
            " | ".join(dict.fromkeys(finding.fix for finding in wrong if finding.fix)),
        )


def _run(
    words: Sequence[str], package: str, environ: Mapping[str, str] = os.environ, key: Path | None = None
) -> str:
    if shutil.which(words[0], path=environ.get("PATH")) is None:
        raise EnvironmentFault(
            f"{words[0]} is not installed", "", f"apt-get install -y {package}; or run scripts/bootstrap.sh"
        )
    try:
        done = subprocess.run(
            words,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLONE_S,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            f"{shlex.join(words)}: no end within {CLONE_S:g} s", "", "see the network"
        ) from None
    if done.returncode:
        hint = f"see that {key}.pub is known to the Git host, and the network" if key else "see above"
        raise EnvironmentFault(f"{shlex.join(words)} failed", " ".join(done.stderr.split())[-400:], hint)
    return done.stdout
