"""Uploads: files to a repository of the Hub in one commit, and a tag on it when everything there is right."""

from __future__ import annotations

import os
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainway.doctor.logins import TOKENS_PAGE, find_token
from trainway.doctor.network import endpoint
from trainway.errors import EnvironmentFault
from trainway.release.allowed import SUMS, is_allowed
from trainway.release.faults import patiently, push_error, status_of
from trainway.release.order import Contents, File

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
Result = TypeVar("Result")
OWN_HUB = "huggingface.co"
HARMLESS = (".gitattributes", "README.md", "LICENSE")
"""What a repository may hold that nobody has put a model into."""
TIMEOUT_S = 300.0
"""Without a byte for so long, a connection counts as broken."""


@dataclass(frozen=True)
class Stored:
    """A file of a repository."""

    git_oid: str
    sha256: str | None
    """Of a large file; Git's own name is that of a pointer then."""

    def equals(self, file: File) -> bool:
        return self.sha256 == file.sha256 if self.sha256 is not None else self.git_oid == file.git_oid


@dataclass(frozen=True)
class Remote:
    """A repository as it is now."""

    private: bool
    head: str
    files: Mapping[str, Stored]
    """At the head of the branch main."""
    tags: Mapping[str, str]
    """{tag: commit}."""

    @property
    def is_ours(self) -> bool:
        """Whether it is empty, or holds what an earlier release has put there."""
        return SUMS in self.files or all(name in HARMLESS for name in self.files)


def open_hub(environ: Mapping[str, str] = os.environ) -> HfApi:
    """The Hub's client with the user's login. Raises EnvironmentFault without a login, or where HF_HUB_OFFLINE is set."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    constants.HF_HUB_DISABLE_TELEMETRY = True
    if not sys.stderr.isatty():
        disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFault(
            "a release needs the Hub", "HF_HUB_OFFLINE is set", "unset it, or look first with --dry-run"
        )
    token = find_token(environ)
    if token is None:
        raise EnvironmentFault(
            "there is no login of the Hub",
            "nothing can be uploaded without one",
            f"make a token with write permission at {TOKENS_PAGE}, then `hf auth login` or export HF_TOKEN=...",
        )
    return HfApi(endpoint=endpoint(environ), token=token)


def look(api: HfApi, repo: str, say: Say) -> Remote | None:
    """The repository as it is; None where there is none that the token may see."""
    return attempt(lambda: _look(api, repo), say, repo, "looking at the repository")


def tree(api: HfApi, repo: str, revision: str) -> dict[str, Stored]:
    """{path: file} of a commit."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: Stored(entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in api.list_repo_tree(repo, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def make_repository(api: HfApi, repo: str, *, private: bool, say: Say) -> Remote:
    """The repository, made where it is not there. Raises EnvironmentFault with the Hub's reason."""
    found = look(api, repo, say)
    if found is not None:
        return found

    def make() -> None:
        try:
            api.create_repo(repo, private=private)
        except Exception as error:
            # the answer of an attempt before may be all that was lost
            if status_of(error) != 409 or _look(api, repo) is None:
                raise

    attempt(make, say, repo, "making the repository")
    say(f"made the {'private' if private else 'public'} repository {repo}")
    found = look(api, repo, say)
    if found is None:
        raise EnvironmentFault(
            f"{repo} cannot be seen after it was made", "the token may not read it", "use another token"
        )
    return found


def refuse_repository(remote: Remote, repo: str, *, private: bool) -> None:
    """Raise EnvironmentFault where a release may not go into a repository that is there."""
    if private and not remote.private:
        raise EnvironmentFault(
            f"{repo} is public, and the release is private",
            "everyone could read what is uploaded there",
            "make the repository private, name another, or say --public (release.private=false)",
        )
    if not remote.is_ours:
        others = ", ".join(sorted(name for name in remote.files if name not in HARMLESS)[:4])
        raise EnvironmentFault(
            f"{repo} holds files that no release of Trainway has put there",
            f"such as {others}",
            "name another repository, or empty that one first",
        )


def differences(files: Iterable[File], there: Mapping[str, Stored]) -> tuple[list[File], list[str]]:
    """(files that are missing or other there, files of an earlier release there that are none of this one)."""
    mine = {file.path: file for file in files}
    changed = [file for name, file in mine.items() if name not in there or not there[name].equals(file)]
    stale = [name for name in there if name not in mine and is_allowed(name)]
    return changed, sorted(stale)


def upload(api: HfApi, repo: str, contents: Contents, remote: Remote, message: str, say: Say) -> str:
    """Make the branch main hold exactly this release, and return the commit. What was uploaded before is not sent again."""
    changed, stale = differences(contents.files, remote.files)
    if not changed and not stale:
        return remote.head
    size = sum(file.size for file in changed)
    say(f"uploading {len(changed)} of {len(contents.files)} files, {size:,} bytes")
    _choose_transfer(api, repo)
    attempt(lambda: _send(api, repo, contents, changed), say, repo, "uploading")

    def commit() -> str:
        # the answer of an attempt before may be all that was lost
        now = _look(api, repo)
        assert now is not None
        rest, old = differences(contents.files, now.files)
        if rest or old:
            _commit(api, repo, contents, rest, old, now.head, message)
            now = _look(api, repo)
            assert now is not None
        return now.head

    return attempt(commit, say, repo, "committing")


def set_tag(api: HfApi, repo: str, tag: str, commit: str, files: Sequence[File], say: Say) -> None:
    """Verify a commit by the hashes of its files, then tag it. Raises EnvironmentFault when it is not what was sent."""
    there = attempt(lambda: tree(api, repo, commit), say, repo, "verifying")
    changed, stale = differences(files, there)
    if changed or stale:
        wrong = ", ".join([*(file.path for file in changed), *stale][:4])
        raise EnvironmentFault(
            f"{repo} does not hold what was uploaded: {wrong}",
            "somebody else has changed it meanwhile, or the Hub has altered it",
            "run the same command again",
        )

    def make() -> None:
        try:
            api.create_tag(repo, tag=tag, revision=commit)
        except Exception as error:
            if status_of(error) != 409:
                raise

    attempt(make, say, repo, "tagging")
    refs = attempt(lambda: api.list_repo_refs(repo), say, repo, "tagging")
    if commit not in [ref.target_commit for ref in refs.tags if ref.name == tag]:
        raise other_commit(repo, tag)


def other_commit(repo: str, tag: str) -> EnvironmentFault:
    """The error of a tag that is in use."""
    return EnvironmentFault(
        f"{repo} has a tag {tag} already, on another commit",
        "a tag is a promise to those who use it, and is never moved",
        "choose another --tag (release.tag)",
    )


def attempt(step: Callable[[], Result], say: Say, repo: str, doing: str) -> Result:
    """Do a step, patiently. Raises UserError for whatever the Hub or the line says in the end."""
    _limit_waiting()
    try:
        return patiently(step, say, doing)
    except Exception as error:
        raise push_error(error, repo, doing) from error


def _look(api: HfApi, repo: str) -> Remote | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if status_of(error) == 401:
            raise
        return None
    refs = api.list_repo_refs(repo)
    head = str(info.sha)
    tags = {tag.name: str(tag.target_commit) for tag in refs.tags}
    return Remote(bool(info.private), head, tree(api, repo, head), tags)


def _send(api: HfApi, repo: str, contents: Contents, files: Sequence[File]) -> None:
    """Upload the large files among these; those that the Hub has are not sent again."""
    api.preupload_lfs_files(repo, additions=_additions(contents.directory, files))


def _commit(
    api: HfApi,
    repo: str,
    contents: Contents,
    changed: Sequence[File],
    stale: Sequence[str],
    parent: str,
    message: str,
) -> None:
    from huggingface_hub import CommitOperationDelete

    api.create_commit(
        repo,
        operations=[
            *_additions(contents.directory, changed),
            *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
        ],
        commit_message=message,
        parent_commit=parent,
    )


def _additions(directory: Path, files: Sequence[File]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    found = []
    for file in files:
        addition = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=directory / file.path)
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # or it would be read and hashed once more
        found.append(addition)
    return found


def _choose_transfer(api: HfApi, repo: str) -> None:
    """Use Git LFS where a server other than the Hub's own does not know the Hub's newer protocol."""
    from huggingface_hub import constants, get_session

    host = urllib.parse.urlsplit(api.endpoint).hostname or ""
    if constants.HF_HUB_DISABLE_XET or host == OWN_HUB or host.endswith(f".{OWN_HUB}"):
        return
    answer = get_session().get(
        f"{api.endpoint}/api/models/{repo}/xet-write-token/main",
        headers={"authorization": f"Bearer {api.token}"},
    )
    if answer.status_code == 404:
        constants.HF_HUB_DISABLE_XET = True


def _limit_waiting() -> None:
    """The library waits for ever by itself."""
    from huggingface_hub import get_session

    get_session().timeout = TIMEOUT_S
