"""Secrets in what is about to leave: tokens of known kinds, values of the environment, private keys. None is repeated."""

from __future__ import annotations

import base64
import bisect
import html
import json
import netrc
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainway.errors import DataError
from trainway.masking import SHORTEST_SECRET, is_secret_variable

KINDS: dict[str, tuple[bytes, bytes]] = {
    "a token of the Hugging Face Hub": (rb"hf_ api_org_", rb"(?:hf_|api_org_)[A-Za-z0-9]{20,}"),
    "a token of GitHub": (
        rb"ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        rb"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}",
    ),
    "a token of GitLab": (rb"glpat-", rb"glpat-[A-Za-z0-9_-]{18,}"),
    "an API key (sk-)": (
        rb"sk-",
        rb"sk-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{20,}",
    ),
    "a key of RunPod": (rb"rpa_", rb"rpa_[A-Za-z0-9]{20,}"),
    "a key of Weights & Biases": (rb"wandb_v1_", rb"wandb_v1_[A-Za-z0-9_]{20,}"),
    "a token of Slack": (rb"xox", rb"xox[abprs]-[A-Za-z0-9-]{20,}"),
    "a key of Amazon": (rb"AKIA ASIA", rb"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a key of Google": (rb"AIza ya29.", rb"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}"),
    "a token of a package index": (rb"npm_ pypi-", rb"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,}"),
    "a signed token (JWT)": (
        rb"eyJ",
        rb"eyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.[A-Za-z0-9_-]{10,}",
    ),
    "a private key": (
        rb"-----BEGIN PuTTY-User-Key-File-",
        rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----(?:\s|\\[nr])*(?:Proc-Type|[\w+/=]{16})|PuTTY-User-Key-File-\d",
    ),
    "a login in an address": (rb"://", rb"://[^/\s:@\"'<>]{1,64}:[^/\s:@\"'<>]{4,128}@"),
}
"""What a secret is: how it may begin (separated by spaces), and its form from there on."""

BLOCK = 8 << 20
OVERLAP = 8 << 10
"""Bytes that two blocks share; no token is longer."""
NEWLINE = b"\n"
ESCAPING = (".md", ".html")
"""Endings of files that do not hold a text as it is."""

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")


@dataclass(frozen=True)
class Secret:
    """Where a secret stands, and of which kind it is; never what it is."""

    file: str
    place: str
    """`line 3`, or `byte 1024` of a file that is not text, or `its name`."""
    kind: str

    def __str__(self) -> str:
        return f"{self.file} ({self.place}): {self.kind}"


class Scanner:
    """Looks for secrets in files and texts."""

    def __init__(self, known: Mapping[str, str]) -> None:
        """known: {what it is: the value} of secrets that this machine has."""
        self._forms: list[tuple[bytes, re.Pattern[bytes], str]] = []
        for kind, (beginnings, form) in KINDS.items():
            pattern = re.compile(form)
            self._forms += [(beginning, pattern, kind) for beginning in beginnings.split()]
        for kind, value in known.items():
            for written in sorted(_forms(value)):
                # inside a longer word it is chance: `password1` is no use of the password `password`
                pattern = re.compile(re.escape(written) + rb"(?![A-Za-z0-9])")
                self._forms.append((written, pattern, kind))

    def text(self, text: str, file: str, place: str) -> Iterator[Secret]:
        """Secrets in a short text, such as a name; `place` says what it is."""
        for kind in dict.fromkeys(kind for _, kind in self._matches(text.encode("utf-8", "replace"))):
            yield Secret(file, place, kind)

    def file(self, path: Path, file: str) -> Iterator[Secret]:
        """Secrets in a file of any size, each kind once a line; it is read in blocks."""
        line, start, tail = 1, 0, b""
        seen: set[tuple[str, str]] = set()
        is_text = _is_text(path)
        with path.open("rb") as opened:
            while block := opened.read(BLOCK):
                data = tail + block
                for at, kind in self._matches(data):
                    place = f"line {line + data.count(NEWLINE, 0, at)}" if is_text else f"byte {start + at}"
                    if (place, kind) not in seen:
                        seen.add((place, kind))
                        yield Secret(file, place, kind)
                tail = data[-OVERLAP:]  # a secret may stand across two blocks
                done = len(data) - len(tail)
                line, start = line + data.count(NEWLINE, 0, done), start + done

    def escaped(self, path: Path, file: str) -> Iterator[Secret]:
        """Secrets in a page, as its reader sees them: without what Markdown, HTML and JSON escape letters by."""
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                yield from self.text(_ESCAPE.sub(_unescaped, html.unescape(line)), file, f"line {number}")

    def _matches(self, data: bytes) -> Iterator[tuple[int, str]]:
        """(place, kind) of each secret. Weights are mostly bytes that no text has: only the rest is looked at closely."""
        starts, places, parts, size = [], [], [], 0
        for place, run in _runs(data):
            starts.append(size)
            places.append(place)
            parts.append(run)
            size += len(run) + 1
        text = b"\0".join(parts)
        for beginning, pattern, kind in self._forms:
            if not beginning.isascii():  # a value with other letters
                yield from ((at, kind) for at in _found(data, beginning, pattern))
                continue
            for at in _found(text, beginning, pattern):
                index = bisect.bisect_right(starts, at) - 1
                yield places[index] + at - starts[index], kind


def known_secrets(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> dict[str, str]:
    """{what it is: value}: of the environment's secret-looking variables, the Hub's login, and ~/.netrc."""
    from trainway.doctor.logins import find_token

    found = {}
    for name, value in environ.items():
        if is_secret_variable(name):
            found[f"the value of {name}"] = value
    if token := find_token(environ):
        found.setdefault("the login of the Hugging Face Hub", token)
    with suppress(OSError, netrc.NetrcParseError, RuntimeError):
        hosts = netrc.netrc(environ.get("NETRC") or (home or Path.home()) / ".netrc").hosts
        found |= {f"the password of {host} in .netrc": login[2] or "" for host, login in hosts.items()}
    values: dict[str, str] = {}
    for kind, value in found.items():
        text = value.strip()
        if len(text) >= SHORTEST_SECRET and not text.startswith("/") and text not in values.values():
            values[kind] = text
    return values


def scan(directory: Path, files: Sequence[str], scanner: Scanner) -> list[Secret]:
    """Every secret in the files of a release and in their names."""
    found: list[Secret] = []
    for name in files:
        found += scanner.text(name, "a file", "its name")
        here = list(scanner.file(directory / name, name))
        if name.endswith(ESCAPING):
            here += [one for one in scanner.escaped(directory / name, name) if one not in here]
        found += here
    return found


def refuse_secrets(found: Sequence[Secret]) -> None:
    """Raise DataError that says where each secret stands; nothing when there is none."""
    if not found:
        return
    shown = "; ".join(map(str, found[:8]))
    rest = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    raise DataError(
        f"{len(found)} secret{'s' * (len(found) > 1)} would leave with the release: {shown}{rest}",
        "whoever can read the repository could use it, and its history forgets nothing",
        "take it out of the run's files and revoke it; unset a variable of the environment whose value is no secret",
    )


def _forms(value: str) -> set[bytes]:
    """The value as it may be written: as it is, in JSON, in an address, in base64."""
    raw = value.encode()
    forms = {raw, json.dumps(value)[1:-1].encode(), urllib.parse.quote(value, safe="").encode()}
    forms |= {json.dumps(value, ensure_ascii=False)[1:-1].encode(), base64.b64encode(raw).rstrip(b"=")}
    return forms | {base64.urlsafe_b64encode(raw).rstrip(b"=")}


def _found(data: bytes, beginning: bytes, pattern: re.Pattern[bytes]) -> Iterator[int]:
    at = data.find(beginning)
    while at >= 0:
        inside = at > 0 and beginning[:1].isalnum() and data[at - 1 : at].isalnum()
        if not inside and pattern.match(data, at):
            yield at
        at = data.find(beginning, at + 1)


def _runs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of every stretch of ASCII that is long enough to be a secret."""
    codes = np.frombuffer(data, np.uint8)
    marks = ((codes >= 32) & (codes < 127)) | ((codes >= 9) & (codes <= 13))
    for width in (1, 2, 4):  # marks[i]: all of the next 2, 4, 8 bytes are text
        marks = marks[:-width] & marks[width:]
    begins = np.flatnonzero(marks)
    if not begins.size:
        return
    gaps = np.flatnonzero(np.diff(begins) > 1)
    firsts = begins[np.concatenate(([0], gaps + 1))].tolist()
    lasts = begins[np.concatenate((gaps, [begins.size - 1]))].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        yield first, data[first : last + SHORTEST_SECRET]


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else match[2]


def _is_text(path: Path) -> bool:
    with path.open("rb") as opened:
        return b"\0" not in opened.read(4096)
