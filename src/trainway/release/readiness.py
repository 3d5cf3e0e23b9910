"""Whether a planned release can be made, known before the training starts: login, repository, room, card."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainway.config.schema import RunConfig
from trainway.doctor.logins import TOKENS_PAGE, may_write, read_login
from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.planning.arithmetic import count_parameters
from trainway.planning.geometry import planned_shape
from trainway.release import hub
from trainway.release.base_id import find_base_id
from trainway.release.card import Facts, make_card
from trainway.release.faults import push_error, status_of
from trainway.run_dir import RunDir

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]

WEIGHT_BYTES = 4
"""Of a trained weight in a checkpoint: fp32."""
LARGEST_FILE = 5 << 30
NO_ROOM = (401, 402, 403, 413, 507)
"""Answers to a planned upload that mean: it would not be taken. Others say nothing of it."""


def refuse_push(config: RunConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Before a training whose end is a release: make the repository, and raise EnvironmentFault where that release could
    not be made. A run that is done already is released by what the release itself finds."""
    if is_done(config):
        return
    try:
        prove_push(config, environ, make=True)
    except UserError as error:
        raise EnvironmentFault(
            f"the release at the end of this run would fail: {error.what}",
            error.why or "it is looked at before the training, which would be paid for first",
            f"{error.fix}; or release.push_to_hub=false",
        ) from error


def is_done(config: RunConfig) -> bool:
    """Whether the run has ended well before: its tag may be there already, and that is no fault."""
    from trainway.training.runs import run_status

    named = config.run_dir or (Path(config.runs_dir) / config.name if config.name else None)
    return named is not None and run_status(RunDir(Path(named)))["state"] == "done"


def prove_push(
    config: RunConfig, environ: Mapping[str, str], *, make: bool, say: Say = lambda line: None
) -> None:
    """See that release.repo can take what the run will make.

    make: make the repository where it is not there: only that shows that its name is free, and its owner has room.

    Raises:
        UserError: no login, no permission, no room, a name or tag that is taken, a card that the Hub refuses.
    """
    settings = config.release
    repo = settings.repo
    assert repo is not None  # the rules see to it
    api = hub.open_hub(environ)
    login = read_login(hub.attempt(api.whoami, say, repo, "asking who the token belongs to"))
    if not may_write(login, repo):
        kind = "is read-only" if login.role == "read" else "may not write there"
        raise EnvironmentFault(
            f"the token of {login.name} {kind}: {repo}",
            "the upload would be refused",
            f"make a token with write permission to {repo} at {TOKENS_PAGE}",
        )
    _prove_card(api, config, say)
    remote = hub.look(api, repo, say)
    if remote is None and make:
        remote = hub.make_repository(api, repo, private=settings.private, say=say)
    if remote is None:
        return
    hub.refuse_repository(remote, repo, private=settings.private)
    if settings.tag in remote.tags:
        raise hub.other_commit(repo, settings.tag)
    _prove_room(api, repo, planned_bytes(config), say)


def planned_bytes(config: RunConfig) -> int:
    """About the size of what the run releases; 0 where the model's shape is not known here."""
    shape = planned_shape(config)
    if shape is None:
        return 0
    counted = count_parameters(shape, lora=config.lora)
    whole = config.release.merge or not config.lora.enabled
    return (counted.total if whole else counted.trainable) * WEIGHT_BYTES


def planned_card(config: RunConfig) -> str:
    """The card as far as it is known before the first step. Raises ConfigError for a base that is none."""
    settings = config.release
    assert settings.repo is not None
    facts = Facts(
        config=config,
        provenance={},
        report={},
        step=0,
        metrics={},
        base=find_base_id(config, {}, settings.base),
        repo=settings.repo,
        tag=settings.tag,
        licence=settings.licence,
        is_adapter=config.lora.enabled and not settings.merge,
        has_picture=False,
        run_name=config.name or "",
    )
    return make_card(facts)


def _prove_card(api: HfApi, config: RunConfig, say: Say) -> None:
    from huggingface_hub import get_session

    repo = str(config.release.repo)
    card = planned_card(config)

    def ask() -> Any:
        return get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers={"authorization": f"Bearer {api.token}"},
        )

    answer = hub.attempt(ask, say, repo, "having the card looked at")
    if answer.status_code != 400:
        return
    try:
        said = "; ".join(str(one.get("message")) for one in answer.json().get("errors", []))
    except (ValueError, AttributeError):
        said = ""
    raise ConfigError(
        f"the Hub refuses the model card of {repo}",
        said[:300] or "it does not say why",
        "correct release.licence or release.base",
    )


def _prove_room(api: HfApi, repo: str, num_bytes: int, say: Say) -> None:
    """Announce an upload of this size, which is never begun. Raises where the Hub would not take it."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    sizes = [LARGEST_FILE] * (num_bytes // LARGEST_FILE) + [max(1, num_bytes % LARGEST_FILE)]
    infos = [
        UploadInfo(size=size, sample=b"", sha256=hashlib.sha256(f"{repo} {number} {size}".encode()).digest())
        for number, size in enumerate(sizes)
    ]
    try:
        post_lfs_batch_info(
            upload_infos=infos, token=str(api.token), repo_type="model", repo_id=repo, endpoint=api.endpoint
        )
    except Exception as error:
        if status_of(error) in NO_ROOM:
            raise push_error(error, repo, "announcing the upload") from error
