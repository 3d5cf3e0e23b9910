"""What the exceptions of the Hugging Face libraries mean to the user of a dataset or a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError, error_chain


def user_error(name: str, error: Exception, *, kind: Literal["dataset", "model"] = "dataset") -> UserError:
    """The error for the user, about the dataset or model `name`, that an exception of the libraries amounts to."""
    chain = list(error_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = " ".join(str(error).split())
    status = next((code for link in chain if (code := _status(link))), None)
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return _refused(name, text, kind)
    # the Hub answers 401 for what does not exist, too, to those whom it does not know
    if status in (401, 403) and "RepositoryNotFoundError" not in kinds:
        return _refused(name, text, kind)
    if "HTTPFileSystem requires" in text:
        return EnvironmentFault(f"{name} cannot be read: it is a URL", text, "pip install 'trainway[hub]'")
    for mark, meaning in _MEANINGS.items():
        if mark in kinds:
            return meaning(name, text, kind)
    if isinstance(error, ValueError) and ("BuilderConfig" in text or "Config name is missing" in text):
        names = ", ".join(re.findall(r"'([^']*)'", text.partition("vailable")[2].partition("]")[0]))
        return ConfigError(
            f"{name}: the subset is missing or unknown", f"its subsets are: {names}", "name one of them"
        )
    return DataError(f"{name}: cannot be read", f"{type(error).__name__}: {text}", f"check the {kind}")


def is_unreachable(error: Exception) -> bool:
    """Whether an exception of the libraries means that there is no way to the Hub, or that it broke off."""
    chain = list(error_chain(error))
    if any(_status(link) in (401, 403, 404) for link in chain):
        return False
    return any(_MEANINGS.get(kind.__name__) is _offline for link in chain for kind in type(link).__mro__)


def _refused(name: str, text: str, kind: str) -> UserError:
    page = f" (https://huggingface.co/{name})" if kind == "model" else ""
    return EnvironmentFault(
        f"the Hub refuses access to {name}",
        text,
        f"accept its terms on its page{page}, and set HF_TOKEN or HUGGINGFACEHUB_API_TOKEN to a token that may read it"
        + (", or run `hf auth login`" if kind == "model" else ""),
    )


def _offline(name: str, text: str, kind: str) -> UserError:
    return EnvironmentFault(
        f"{name} cannot be reached",
        text,
        "check the network and HF_HUB_OFFLINE, or name a local directory or file instead",
    )


def _no_revision(name: str, text: str, kind: str) -> UserError:
    if kind == "dataset":
        return _not_found(name, text, kind)
    return DataError(f"the {kind} {name} has no such revision", text, "name a commit, tag or branch of it")


def _not_found(name: str, text: str, kind: str) -> UserError:
    if "://" in name or "any data files" in text or Path(name).expanduser().exists():
        return DataError(
            f"{name}: no data was found",
            text,
            "check the path or URL, the names of the files and the network",
        )
    where = Path(name).expanduser().absolute()
    return DataError(
        f"the {kind} {name} was not found",
        f"looked for the directory or file {where}, then for {name} on the Hub: {text}",
        f"correct the name; a private {kind} needs HF_TOKEN or HUGGINGFACEHUB_API_TOKEN",
    )


_MEANINGS: dict[str, Callable[[str, str, str], UserError]] = {
    "OfflineModeIsEnabled": _offline,
    "ConnectionError": _offline,
    "ConnectError": _offline,
    "ClientConnectorError": _offline,
    "TimeoutException": _offline,
    "TransportError": _offline,
    "LocalEntryNotFoundError": _offline,
    "FileNotFoundError": _not_found,
    "RepositoryNotFoundError": _not_found,
    "RevisionNotFoundError": _no_revision,
}
"""What an error means, by the name of a class in its chain: the classes move between versions of the libraries."""


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None
