"""`release`: a run's checkpoint → a directory of what may leave → the Hub → a tag; again, it completes what broke off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainway.config.schema import RunConfig
from trainway.data.turns import turn
from trainway.doctor.network import endpoint
from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError
from trainway.files import atomic_write, disk_faults, read_json
from trainway.release import hub
from trainway.release.allowed import CARD, Left
from trainway.release.base_id import find_base_id
from trainway.release.contents import chosen_step, make_contents, open_contents, order_key, read_run
from trainway.release.order import Contents, File, Order
from trainway.release.secrets import Scanner, known_secrets, refuse_secrets, scan
from trainway.run_dir import RunDir

Say = Callable[[str], None]


@dataclass(frozen=True)
class Released:
    """What came of a release."""

    state: Literal["released", "unchanged", "dry run"]
    repo: str
    tag: str
    private: bool
    step: int
    revision: str | None
    """The commit that the tag is on; None for a dry run."""
    url: str
    files: tuple[File, ...]
    left: tuple[Left, ...]
    """What stayed here, each with a reason."""
    card: str = ""
    """For a dry run."""


def plan_order(config: RunConfig, **given: Any) -> Order:
    """What to release: what the caller says (None: nothing), else the section `release` of the run's settings.

    Raises ConfigError when no repository is named, or a name is none.
    """
    settings = config.release
    words = {key: value for key, value in given.items() if value is not None}
    cost = words.pop("cost", None)
    try:
        checked = type(settings).model_validate({**settings.model_dump(), **words})
    except ValueError as error:
        first = (
            error.errors(include_url=False)[0]
            if hasattr(error, "errors")
            else {"loc": ("",), "msg": str(error)}
        )
        key = str(first["loc"][0])
        raise ConfigError(
            f"{key} is {words.get(key)!r}", f"it must be {first['msg']}", f"e.g. {EXAMPLES.get(key, 'none')}"
        ) from None
    if checked.repo is None:
        raise ConfigError(
            "no repository is named",
            "a release goes to one of the Hub",
            "say --repo OWNER/NAME (release.repo)",
        )
    return Order(
        repo=checked.repo,
        tag=checked.tag,
        which=checked.which,
        merge=checked.merge,
        private=checked.private,
        licence=checked.licence,
        base=checked.base,
        cost=cost,
    )


EXAMPLES = {"repo": "ada/my-model", "tag": "v0.1", "licence": "apache-2.0", "base": "Qwen/Qwen3-0.6B"}


def release(
    run: str | Path,
    *,
    dry_run: bool = False,
    environ: Mapping[str, str] = os.environ,
    say: Say = lambda line: None,
    **given: Any,
) -> Released:
    """Upload a run's checkpoint to the Hub, and tag it when all is there; see `plan_order` for what `given` may say.

    The same call completes a release that broke off, and changes nothing where the Hub has all of it already.

    Args:
        dry_run: make it, check it, and remove it again; the network is not touched.
        say: told what happens, a line at a time.

    Raises:
        ConfigError: no such run, checkpoint or repository's name; nothing to merge.
        DataError: a checkpoint is damaged, or a secret would leave.
        EnvironmentFault: no login, no permission, no room, the tag or the name is taken, the connection broke off.
    """
    run_dir = RunDir(Path(run))
    if not run_dir.config.is_file():
        raise ConfigError(
            f"{run} is no run directory", "it has no config.yaml", "`trainway runs` lists the runs"
        )
    config, _ = read_run(run_dir)
    order = plan_order(config, **given)
    step = chosen_step(run_dir, order.which)
    key = order_key(run_dir, order, step)
    home = run_dir.releases
    with disk_faults(home):
        home.mkdir(exist_ok=True)
        with turn(home / ".lock"):
            if dry_run:
                return _dry_run(run_dir, order, step, home / f"{key}-dry", environ, say)
            return _publish(run_dir, order, step, home / key, environ, say)


def _dry_run(
    run: RunDir, order: Order, step: int, place: Path, environ: Mapping[str, str], say: Say
) -> Released:
    _clear(place)
    try:
        contents = make_contents(run, order, step, place, say)
        refuse_secrets(_secrets(contents, order, environ))
        card = (contents.directory / CARD).read_text(encoding="utf-8")
    finally:
        _clear(place)
    return _told("dry run", order, step, None, contents.files, contents.left, environ, card)


def _publish(
    run: RunDir, order: Order, step: int, place: Path, environ: Mapping[str, str], say: Say
) -> Released:
    record = place.with_suffix(".json")
    api = hub.open_hub(environ)
    if done := _read_record(record):
        files = tuple(File(**one) for one in done["files"])
        remote = hub.look(api, order.repo, say)
        if remote is not None and remote.tags.get(order.tag) == done["revision"]:
            left = tuple(Left(**one) for one in done["left"])
            return _told("unchanged", order, step, str(done["revision"]), files, left, environ)
        say(f"{order.repo} has lost the tag {order.tag}: it is released once more")
    contents = _ready(run, order, step, place, say)
    say(f"looking for secrets in {len(contents.files)} files")
    refuse_secrets(_secrets(contents, order, environ))
    remote = hub.make_repository(api, order.repo, private=order.private, say=say)
    hub.refuse_repository(remote, order.repo, private=order.private)
    if remote.private and not order.private:
        say(f"{order.repo} is private, and stays so: its settings on the Hub make it public")
    if order.tag in remote.tags:
        revision = remote.tags[order.tag]
        there = hub.attempt(lambda: hub.tree(api, order.repo, revision), say, order.repo, "comparing")
        if any(hub.differences(contents.files, there)):
            raise hub.other_commit(order.repo, order.tag)
        state: Literal["released", "unchanged"] = "unchanged"
    else:
        message = f"Release {order.tag}"
        revision = hub.upload(api, order.repo, contents, remote, message, say)
        hub.set_tag(api, order.repo, order.tag, revision, contents.files, say)
        state = "released"
    told = _told(state, order, step, revision, contents.files, contents.left, environ)
    _write_record(record, told)
    _clear(place)
    return told


def complete_command(run: Path, config: RunConfig) -> str:
    """The command that releases what a run's settings say."""
    settings = config.release
    words = ["trainway", "release", str(run), "--repo", str(settings.repo), "--tag", settings.tag]
    return " ".join(words)


def release_after_training(
    run: Path, config: RunConfig, say: Say, environ: Mapping[str, str] = os.environ
) -> Released:
    """Release a run that is done as its settings say.

    Raises EnvironmentFault that names the command that completes it: the run itself is whole.
    """
    settings = config.release
    given = {key: getattr(settings, key) for key in type(settings).model_fields if key != "push_to_hub"}
    try:
        return release(run, environ=environ, say=say, **given)
    except UserError as error:
        why = f"{error.why}; {error.fix}" if error.why and error.fix else error.why or error.fix
        raise EnvironmentFault(
            f"the run is done and whole, and its release failed: {error.what}",
            why,
            f"`{complete_command(run, config)}` completes it",
        ) from error


def _ready(run: RunDir, order: Order, step: int, place: Path, say: Say) -> Contents:
    """What lies ready from an attempt before, where it is whole; else it is made."""
    config, provenance = read_run(run)
    if place.is_dir():
        try:
            return open_contents(place, find_base_id(config, provenance, order.base))
        except DataError as error:
            say(f"{error.what}: it is made again")
    for other in place.parent.iterdir():  # a release that was given up; it would be made again
        if other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
    _clear(place)
    say(f"making the release of step {step}")
    return make_contents(run, order, step, place, say)


def _secrets(contents: Contents, order: Order, environ: Mapping[str, str]) -> list[Any]:
    scanner = Scanner(known_secrets(environ))
    names = [file.path for file in contents.files]
    # names of repositories and tags are read by everybody, too
    said = [*scanner.text(order.repo, "--repo", "its name"), *scanner.text(order.tag, "--tag", "its name")]
    return [*said, *scan(contents.directory, names, scanner)]


def _told(
    state: Literal["released", "unchanged", "dry run"],
    order: Order,
    step: int,
    revision: str | None,
    files: tuple[File, ...],
    left: tuple[Left, ...],
    environ: Mapping[str, str],
    card: str = "",
) -> Released:
    url = f"{endpoint(environ).rstrip('/')}/{order.repo}"
    if revision is not None:
        url += f"/tree/{order.tag}"
    return Released(state, order.repo, order.tag, order.private, step, revision, url, files, left, card)


def _write_record(path: Path, told: Released) -> None:
    fields = asdict(replace(told, state="released"))
    del fields["card"]
    atomic_write(path, json.dumps(fields, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record: dict[str, Any] = read_json(path)
    return record


def _clear(place: Path) -> None:
    """Remove what was made ready, and what an attempt that was killed has left of it."""
    for path in place.parent.glob(f"{place.name}*"):
        if path.suffix == ".json" and path.name == f"{place.name}.json":
            continue  # the record of what is done
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
