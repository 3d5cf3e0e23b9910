"""A Hugging Face Hub on this machine: datasets and models of given files at given commits, for the real libraries."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.servers import QuietHandler, http_server


class FakeHub:
    """`commits` of a dataset or model: {commit: {file name: bytes}}; the newest is the one added last."""

    def __init__(self) -> None:
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        """Files whose connection breaks off halfway."""
        self.token: str | None = None
        self.login: dict[str, Any] = {}
        """What whoami answers to the token."""
        self.date: str | None = None
        """The clock of this server, as HTTP writes it; None: the real one."""
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) for a request."""
        self.requests.append((path, authorization))
        parts = urllib.parse.unquote(path.split("?")[0]).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts == ["whoami-v2"]:
            known = self.token is not None and authorization == f"Bearer {self.token}"
            return _json(self.login) if known else (401, b'{"error": "Invalid credentials"}', {})
        if parts[0] not in ("datasets", "models"):  # the files of a model lie at the top
            parts = ["models", *parts]
        repositories = self.models if parts[0] == "models" else self.datasets
        name, rest = "/".join(parts[1:3]), parts[3:]
        if name not in repositories:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        # of a gated model anyone may see the list of files
        is_open = repositories is self.models and is_api and rest[:1] != ["auth-check"]
        if name in self.gated and not is_open and authorization != f"Bearer {self.token}":
            return (
                403 if authorization else 401,
                b"{}",
                {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."},
            )
        if is_api and rest[:1] == ["auth-check"]:
            return _json({})
        commits = repositories[name]
        wanted = rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if wanted == "main" else wanted
        if commit not in commits:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        files = commits[commit]
        if is_api and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            return _json(
                {
                    "id": name,
                    "sha": commit,
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "siblings": siblings,
                }
            )
        if is_api and len(rest) > 2:  # a folder: all files are at the top
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        if is_api:  # tree and paths-info
            return _json(
                [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()]
            )
        file = "/".join(rest[2:])
        if file not in files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        etag = commit if repositories is self.datasets else hashlib.sha256(files[file]).hexdigest()
        return 200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": commit}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(QuietHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return hub.date or super().date_time_string(timestamp)

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body, headers = hub.answer(self.path, self.headers.get("Authorization"))
            self.reply(status, body, headers, cut=self.path.rpartition("/")[2] in hub.cut)

    with http_server(Handler) as hub.url:
        yield hub


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
