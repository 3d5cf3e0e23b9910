"""Secrets in texts: which variables of the environment hold one, what tokens look like, and texts without them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

MASK = "***"
SHORTEST_SECRET = 8
"""Characters of a value that is looked for: a shorter one stands in every text by chance."""

_SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|AUTHORIZATION|(?:^|(?<!PUBLIC)_)KEY)(?:$|_)",
    re.IGNORECASE,
)
_ABOUT_SECRET = re.compile(r"_(?:PATH|FILE|DIR|URL|NAME|TYPE|LIMIT|TTL|(?<!KEY_)ID)$", re.IGNORECASE)
"""Endings of names that say where a secret is, or how large, and not what it is."""

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
_BEGINNINGS = r"(?:hf_|api_org_|gh[pousr]_|github_pat_|glpat-|sk-|rpa_|xox[abprs]-|AKIA|ASIA|AIza|wandb_v1_|npm_|pypi-|ya29\.|eyJ)"
_KNOWN = re.compile(rf"{_BEGINNINGS}[\w.\-]{{12,}}")
_SURELY = re.compile(rf"(?<![A-Za-z0-9]){_BEGINNINGS}[\w.\-]{{16,}}")


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


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is secret: HF_TOKEN, DB_PASSWORD_2, AWS_ACCESS_KEY_ID;
    not MAX_TOKENS, DB_PASSWORD_FILE, PUBLIC_KEY, NCCL_IB_PKEY."""
    return bool(_SECRET_VARIABLE.search(name) and not _ABOUT_SECRET.search(name))


def holds_token(text: str) -> bool:
    """Whether a token of a known kind stands in a text as a word; hiding is less strict, since it costs nothing."""
    return bool(_SURELY.search(text))


def secret_values(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the environment's variables with a secret's name hold, the longest first: one may hold another. No paths, and
    nothing so short that it stands in a text by chance."""
    values = {value.strip() for name, value in environ.items() if is_secret_variable(name)}
    found = [value for value in values if len(value) >= SHORTEST_SECRET and not value.startswith("/")]
    return sorted(found, key=lambda value: (-len(value), value))


def hide_secrets(text: str, values: Iterable[str] | None = None) -> str:
    """A text with tokens of known kinds, and these values, replaced by ***; None: those of this process's secrets."""
    for value in secret_values() if values is None else values:
        text = text.replace(value, MASK)
    return mask_tokens(text)


def _mask(argument: str) -> str:
    if match := _SETTING.fullmatch(argument):
        return match[1] + MASK
    return _INSIDE.sub(rf"\1{MASK}", mask_tokens(argument))
