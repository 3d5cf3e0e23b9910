"""A model of the Hugging Face Hub as a directory: downloaded once, checked before, found again without a network."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from trainway.checkpoint.weights import INDEX_FILE
from trainway.data.hub import TOKEN_VARIABLES
from trainway.data.hub_errors import is_unreachable, user_error
from trainway.data.turns import Progress
from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError
from trainway.models.base_files import CONFIG, TOKENIZER, WEIGHTS, index_places, weight_names

COMMIT = re.compile(r"[0-9a-f]{40}")

_SMALL = re.compile(r"[^/]+\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja")
"""Configurations, tokenizers, chat templates, licences."""
_CODE = re.compile(r"[^/]+\.py")


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, in the cache of the Hub's own library."""

    directory: Path
    commit: str
    note: str = ""


def fetch_model(
    name: str, revision: str | None, *, with_code: bool, needs_tokenizer: bool, report: Progress
) -> Snapshot:
    """The directory of the model `name` at `revision` (the newest commit without one), downloaded where it is not yet.

    Only safetensors, and the files of configuration and tokenizer are taken; code only `with_code`. Without a network,
    or with HF_HUB_OFFLINE=1, the copy in the cache is used if it is whole.

    Raises:
        EnvironmentFault: no access (the licence is not accepted, the token may not read it), no network and files
            missing in the cache (each is named), no room on the disk.
        DataError: no such model or revision, or it lacks files.
        ConfigError: it has no safetensors.
    """
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision, needs_tokenizer, "HF_HUB_OFFLINE is set")
    is_commit = revision is not None and COMMIT.fullmatch(revision) is not None
    if is_commit and _is_whole(name, str(revision), needs_tokenizer, with_code):
        return _cached(name, revision, needs_tokenizer, "")  # a commit never changes: nothing to ask
    try:
        info = HfApi(token=_token()).model_info(name, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:
        if is_unreachable(error):
            return _cached(
                name, revision, needs_tokenizer, f"the Hub cannot be reached ({type(error).__name__})"
            )
        raise user_error(name, error, kind="model") from error
    commit = str(info.sha)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    try:
        snapshot = _download(name, commit, sizes, with_code, needs_tokenizer, report)
    except UserError:
        raise
    except Exception as error:
        if not is_unreachable(error):
            raise user_error(name, error, kind="model") from error
        lacking = ", ".join(_missing_in(_snapshot_folder(name, commit), needs_tokenizer))
        raise EnvironmentFault(
            f"the download of the model {name} broke off",
            f"{type(error).__name__}: {' '.join(str(error).split())}; still missing: {lacking}",
            "check the network and start again: what has arrived is kept",
        ) from error
    if not is_commit:
        _remember(name, revision or "main", commit)
    return snapshot


def _download(
    name: str,
    commit: str,
    sizes: Mapping[str, int],
    with_code: bool,
    needs_tokenizer: bool,
    report: Progress,
) -> Snapshot:
    """sizes: of all files of the commit, in bytes."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if INDEX_FILE in sizes:
        index = hf_hub_download(name, INDEX_FILE, revision=commit, token=_token())
        weights = sorted(set(index_places(Path(index)).values()))
    else:
        weights = [WEIGHTS]
    missing = [
        file for file in [CONFIG, *([TOKENIZER] if needs_tokenizer else ()), *weights] if file not in sizes
    ]
    if missing:
        raise _lacks(name, missing, sizes)
    small = [file for file in sizes if _SMALL.fullmatch(file) or (with_code and _CODE.fullmatch(file))]
    wanted = [*small, *weights]
    lacking = [file for file in wanted if _in_cache(name, commit, file) is None]
    total = sum(sizes[file] for file in lacking)
    _check_room(name, total)
    if lacking:
        with _reported(f"downloading {name}", name, total, report):
            snapshot_download(
                name, revision=commit, allow_patterns=_literal(wanted), token=_token(), tqdm_class=_NoBar
            )
    folder = _in_cache(name, commit, CONFIG)
    assert folder is not None
    return Snapshot(folder.parent, commit)


def _cached(name: str, revision: str | None, needs_tokenizer: bool, why: str) -> Snapshot:
    """What the cache has of a model, with the reason `why` nothing more can be had. Raises EnvironmentFault."""
    commit = _cached_commit(name, revision)
    config = _in_cache(name, commit, CONFIG) if commit else None
    if commit is None or (config is None and not _snapshot_folder(name, commit).is_dir()):
        at = f" at {revision}" if revision else ""
        raise EnvironmentFault(
            f"the model {name}{at} is not in the cache of the Hub",
            f"{why}, and there is no copy in {_repository(name)}",
            f"run `hf download {name}` where there is a network and copy the cache (HF_HOME), or name a local directory",
        )
    folder = _snapshot_folder(name, commit)
    missing = _missing_in(folder, needs_tokenizer)
    if missing:
        raise EnvironmentFault(
            f"the model {name} is not whole in the cache of the Hub",
            f"{why}, and {folder} lacks {', '.join(missing)}",
            f"run `hf download {name} --revision {commit}` where there is a network",
        )
    return Snapshot(folder, commit, f"{why}: commit {commit[:12]} of the cache is used" if why else "")


def _is_whole(name: str, commit: str, needs_tokenizer: bool, with_code: bool) -> bool:
    folder = _snapshot_folder(name, commit)
    if _missing_in(folder, needs_tokenizer):
        return False
    return not with_code or any(folder.glob("*.py"))


def _missing_in(folder: Path, needs_tokenizer: bool) -> list[str]:
    names, lacking = weight_names(folder)
    wanted = [CONFIG, *([TOKENIZER] if needs_tokenizer else ()), *names]
    return [name for name in wanted if not (folder / name).exists()] + lacking


def _lacks(name: str, missing: list[str], files: Mapping[str, int]) -> UserError:
    if missing == [WEIGHTS] or missing[:1] == [CONFIG]:
        others = [file for file in files if file.endswith((".gguf", ".bin", ".pth", ".pt"))]
        adapter = "adapter_config.json" in files and CONFIG in missing
        if adapter:
            why, fix = "it is an adapter", "name the base model that it belongs to"
        else:
            why = (
                f"it has {', '.join(others[:3])} instead"
                if others
                else f"its files are {', '.join([*files][:8])}"
            )
            fix = "name a model, or a revision of this one, that has safetensors"
        return ConfigError(f"the model {name} has no {' and no '.join(missing)}", why, fix)
    return DataError(
        f"the model {name} lacks files on the Hub", ", ".join(missing), "tell its author, or name another"
    )


def _check_room(name: str, num_bytes: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise EnvironmentFault(
            f"no room for the model {name}",
            f"its files need {num_bytes / 1e9:.1f} GB more, and {existing} has {free / 1e9:.1f} GB free",
            "free some space, or set HF_HOME to a directory on a larger disk",
        )


def _cached_commit(name: str, revision: str | None) -> str | None:
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    reference = _repository(name) / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def _remember(name: str, revision: str, commit: str) -> None:
    """Note which commit a branch or tag means, as the Hub's own library does: for a later start without a network."""
    reference = _repository(name) / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def _repository(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _snapshot_folder(name: str, commit: str) -> Path:
    return _repository(name) / "snapshots" / commit


def _in_cache(name: str, commit: str, file: str) -> Path | None:
    path = _snapshot_folder(name, commit) / file
    return path if path.exists() else None


def _literal(names: list[str]) -> list[str]:
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]


def _token() -> str | None:
    return next((os.environ[key] for key in TOKEN_VARIABLES if os.environ.get(key)), None)


@contextmanager
def _reported(label: str, name: str, total: int, report: Progress) -> Iterator[None]:
    """Report the bytes that arrive in the cache while the block runs."""
    blobs, ended = _repository(name) / "blobs", threading.Event()
    before = _size(blobs)

    def watch() -> None:
        while not ended.wait(1.0):
            report(label, min(_size(blobs) - before, total), total)

    watcher = threading.Thread(target=watch, daemon=True)
    report(label, 0, total)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    report(label, total, total)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # one that is complete gets another name
            total += path.stat().st_size
    return total


class _NoBar(tqdm):
    """The Hub's library has one bar per file, and our own report is enough."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
