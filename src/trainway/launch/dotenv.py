"""A `.env` file: KEY=VALUE lines that stand below the real environment. Nothing in it is expanded or run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trainway.errors import ConfigError

DOTENV = ".env"
MAX_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"(?:export\s+)?(?P<name>[^\s=]+)=(?P<rest>.*)", re.S)
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "$": "$", "`": "`"}
_LOADER = re.compile(r"LD_[A-Z_]+|PYTHON[A-Z]*|PATH|DYLD_[A-Z_]+|BASH_ENV|ENV")
"""What decides which code a process runs does not come from a file that lies about in a directory."""


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a file, in order; a later line wins.

    A line is KEY=VALUE, with or without `export`; blank lines and comments (`#` at the beginning or after a space) are
    left out. 'single quotes' keep everything, "double quotes" know \\n, \\t, \\", \\\\, \\$ and \\`; without quotes a
    value has no spaces. `$NAME` and `$(...)` are plain text.

    Raises ConfigError naming file and line; no message repeats a value, which may be a secret.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            name, value = _variable(line, f"{path}:{number}")
            found[name] = value
    return found


def apply_dotenv(found: Mapping[str, str], environ: MutableMapping[str, str]) -> list[str]:
    """Set what `environ` does not have; returns the names that were set. The real environment wins."""
    new = [name for name in found if name not in environ]
    environ.update({name: found[name] for name in new})
    return new


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error), "correct --env-file") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes", "it holds variables, a line each")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None


def _variable(line: str, where: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ConfigError(
            f"{where}: not KEY=VALUE", "a name, an equals sign, no space around it", "correct it"
        )
    name = match["name"]
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: not the name of a variable", "letters, digits and _, no digit first", "correct it"
        )
    if _LOADER.fullmatch(name):
        raise ConfigError(
            f"{where}: {name} is not taken from a file",
            "it decides which code runs",
            "take it out, and set it in the real environment",
        )
    return name, _value(match["rest"], f"{where}: {name}")


def _value(rest: str, where: str) -> str:
    quote = rest[:1]
    if quote not in ("'", '"'):
        value = re.split(r"(?:^|\s)#", rest, maxsplit=1)[0].rstrip()
        if re.search(r"\s", value) or "\0" in value:
            raise ConfigError(f"{where} has spaces in its value", "", "put it in quotes")
        if "'" in value or '"' in value:
            raise ConfigError(f"{where} has a quote within its value", "", "put all of it in quotes")
        return value
    body = r"'(?P<text>[^'\0]*)'" if quote == "'" else r'"(?P<text>(?:[^"\\\0]|\\.)*)"'
    match = re.match(body, rest)
    if match is None:
        raise ConfigError(f"{where} has an open quote", f"no {quote} closes it on this line", "close it")
    after = rest[match.end() :]
    if after.strip() and not re.match(r"\s+#", after):
        raise ConfigError(f"{where} goes on after its quotes", "", "put all of it in quotes")
    if quote == "'":
        return match["text"]
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), match["text"])


def source_dotenv(path: Path | None, environ: MutableMapping[str, str] = os.environ) -> tuple[str, ...]:
    """Put `path`, or a .env of the working directory where there is one, below the environment; what to say of it."""
    if path is None and not Path(DOTENV).is_file():
        return ()
    path = path or Path(DOTENV)
    new = apply_dotenv(read_dotenv(path), environ)
    return (f"{path} sets {', '.join(new) or 'nothing that is not set already'}",)
