"""What the Hub's answers and a broken line mean to somebody who uploads."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from trainway.data.hub_errors import is_unreachable
from trainway.data.printable import printable
from trainway.errors import ConfigError, EnvironmentFault, UserError, error_chain
from trainway.masking import mask_tokens

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
TRANSIENT = (408, 412, 425, 429, 500, 502, 503, 504)
"""Answers after which the same may well succeed; 412: somebody else's commit came first."""
TRIES = 5
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0

_FULL = re.compile(r"(?i)storage|quota|limit|billing|payment|upgrade|plan\b")
Result = TypeVar("Result")


def patiently(step: Callable[[], Result], say: Callable[[str], None], doing: str) -> Result:
    """Do a step of an upload, again after a fault that may pass: 5 times at most, ever more slowly.

    doing: what the step does, in words. A step must be one that may be done twice.
    Raises what the last attempt raised.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return step()
        except UserError:
            raise
        except Exception as error:
            if attempt == TRIES or not is_transient(error):
                raise
            wait_s = _asked_wait(error) or FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            say(f"{doing}: {_said(error)}; again in {wait_s:.0f} s ({attempt} of {TRIES - 1})")
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def is_transient(error: Exception) -> bool:
    """Whether the same may succeed a little later."""
    status = status_of(error)
    return status in TRANSIENT if status is not None else is_unreachable(error)


def status_of(error: BaseException) -> int | None:
    """The status that a server has answered with; None where none has."""
    for link in error_chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def push_error(error: Exception, repo: str, doing: str) -> UserError:
    """The error for the user that an exception of the Hub's library amounts to.

    doing: what was attempted, in words, such as `making the repository`.
    """
    if isinstance(error, UserError):
        return error
    status, said = status_of(error), _said(error)
    owner = repo.partition("/")[0]
    if status == 401:
        return EnvironmentFault(
            "the Hub refuses the token: it is expired, revoked or mistyped",
            said,
            f"make a new one at {TOKENS_PAGE}, then `hf auth login` or export HF_TOKEN=...",
        )
    if status == 402 or (status == 403 and _FULL.search(said)):
        return EnvironmentFault(
            f"{owner} has no room on the Hub for {repo}",
            said,
            "free some storage there, take a larger plan, or name a repository of another owner",
        )
    if status == 403:
        return EnvironmentFault(
            f"the token may not write {repo}",
            said,
            f"make a token with write permission to {repo} at {TOKENS_PAGE}",
        )
    if status == 404:
        return EnvironmentFault(
            f"the Hub has no {repo}, or the token may not see it",
            said,
            "check the name, and that the token belongs to its owner",
        )
    if status == 409:
        return EnvironmentFault(f"{repo}: the name is taken", said, "choose another --repo")
    if status == 412:
        return EnvironmentFault(
            f"{repo} was changed by somebody else meanwhile", said, "run the same command again"
        )
    if status == 413:
        return EnvironmentFault(
            f"a file is too large for {repo}", said, "export in smaller shards, or ask the Hub for more"
        )
    if status == 400 or isinstance(error, ValueError):
        return ConfigError(f"the Hub does not take {repo} as it is", said, "correct what it names")
    if status == 429:
        return EnvironmentFault("the Hub asks to wait", said, "run the same command again later")
    if status is not None and status >= 500:
        return EnvironmentFault(
            f"the Hub fails while {doing}: status {status}",
            said,
            "run the same command again: what has arrived is kept",
        )
    if is_unreachable(error):
        return EnvironmentFault(
            f"the connection to the Hub broke off while {doing}",
            said,
            "check the network and run the same command again: what has arrived is kept",
        )
    return EnvironmentFault(
        f"{repo}: failed while {doing}", said, "run the same command again: what has arrived is kept"
    )


def _said(error: BaseException) -> str:
    """The server's own words, or the library's, on one line and without secrets."""
    for link in error_chain(error):
        response = getattr(link, "response", None)
        if response is None:
            continue
        text = response.headers.get("X-Error-Message") or getattr(link, "server_message", None)
        status = f"status {response.status_code}"
        return f"{status}: {_clean(text)}" if text else status
    last = [*error_chain(error)][-1]
    return _clean(f"{type(last).__name__}: {last}" if str(last) else type(last).__name__)


def _clean(text: object) -> str:
    return printable(mask_tokens(" ".join(str(text).split())))[:300]


def _asked_wait(error: BaseException) -> float | None:
    for link in error_chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        text = headers.get("Retry-After", "") if headers is not None else ""
        if text.isascii() and text.isdigit():
            return min(float(text), LONGEST_WAIT_S)
    return None
