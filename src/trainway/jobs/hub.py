"""A job's release to the Hugging Face Hub: `hf://OWNER/NAME`, where its token comes from, and what it asks of the Hub."""

from __future__ import annotations

from trainway.config.schema import RunConfig
from trainway.data.hub import TOKEN_VARIABLES
from trainway.jobs.spec import JobSpec, Release

SCHEME = "hf://"
FIELDS = ("tag", "private", "which", "merge", "licence", "base")
"""What a run and a job may say of a release alike."""


def hub_repository(to: str | None) -> str | None:
    """OWNER/NAME of a release that goes to the Hub; None for one that goes elsewhere."""
    return to.removeprefix(SCHEME) if to is not None and to.startswith(SCHEME) else None


def has_token(spec: JobSpec) -> bool:
    """Whether a variable that a login of the Hub is read from is among the job's secrets."""
    return any(name in spec.secrets for name in TOKEN_VARIABLES)


def settle_release(config: RunConfig, release: Release) -> tuple[RunConfig, Release]:
    """A run that would release by itself leaves that to its job, which tries again and keeps the machine's disk for it."""
    if not config.release.push_to_hub:
        return config, release
    section = config.release
    fields = {name: getattr(section, name) for name in FIELDS}
    settled = config.model_copy(update={"release": section.model_copy(update={"push_to_hub": False})})
    return settled, Release(to=f"{SCHEME}{section.repo}", **fields)


def with_release(config: RunConfig, release: Release) -> RunConfig:
    """The run's settings as if its training released it: what is looked at before anything is rented."""
    repo = hub_repository(release.to)
    if repo is None:
        return config
    fields = {name: getattr(release, name) for name in FIELDS}
    section = config.release.model_copy(update={**fields, "repo": repo, "push_to_hub": True})
    return config.model_copy(update={"release": section})


def release_words(release: Release, run: str, which: str, dollars: float) -> tuple[str, ...]:
    """The words of `trainway release` after the program's name. dollars: spent so far; 0 where nothing is paid."""
    words = [
        "release",
        run,
        "--repo",
        str(hub_repository(release.to)),
        "--tag",
        release.tag,
        "--which",
        which,
    ]
    words += ["--merge"] * release.merge + ["--public"] * (not release.private)
    words += [
        word
        for name in ("licence", "base")
        if (value := getattr(release, name))
        for word in (f"--{name}", value)
    ]
    return tuple(words + (["--cost", f"{dollars:.2f}"] if dollars else []))
