"""A Hugging Face Hub on loopback that takes uploads, for the real client: its state on disk, its faults at will."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.servers import QuietHandler, http_server

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".model")
LFS_FROM_BYTES = 10_000_000
BLOCK = 1 << 14
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
Reply = tuple[int, bytes, dict[str, str]]


@dataclass
class Account:
    """Whom a token belongs to."""

    name: str
    role: str = "write"
    """read, write or fineGrained."""
    orgs: dict[str, str] = field(default_factory=dict)
    """{organisation: the role in it}."""
    scopes: tuple[str, ...] = ()
    """fineGrained: owners and repositories that may be written."""


@dataclass
class Forced:
    """An answer that is given instead of the real one, `times` times."""

    pattern: str
    """Searched in `METHOD /path`."""
    status: int
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after: bool = False
    """Do what was asked first: only the answer is lost."""


class Cut(Exception):
    """The connection breaks off here."""


class HubServer:
    """`accounts`: {token: account}. Everything that was uploaded lies below `root`, and survives a restart."""

    def __init__(self, root: Path, accounts: dict[str, Account]) -> None:
        self.root, self.accounts = root, accounts
        self.quota_bytes: int | None = None
        """Of all files of an owner."""
        self.reserved: set[str] = set()
        """Repositories that cannot be created and cannot be seen."""
        self.forced: list[Forced] = []
        self.requests: list[str] = []
        """`METHOD /path` of each."""
        self.received = bytearray()
        """Every byte that has come in: bodies, paths and headers but the login."""
        self.cuts: list[str] = []
        """`METHOD /path` of those whose connection broke off."""
        self.url = ""
        self.multipart_bytes: int | None = None
        """LFS files are taken in parts of this size."""
        self._lock = threading.RLock()
        self._requests_left: int | None = None
        self._bytes_left: int | None = None
        self._after = False
        self.once = False
        self.is_cut = False

    # ---- faults

    def cut(
        self,
        *,
        requests: int | None = None,
        num_bytes: int | None = None,
        after: bool = False,
        once: bool = False,
    ) -> None:
        """Break the connection off at the request, or the byte of a body, of this number, counted from now.

        after: the request is done, and only its answer is lost. once: the next connection is well again; else all are
        cut until `mend`.
        """
        self.mend()
        self._requests_left, self._bytes_left, self._after, self.once = requests, num_bytes, after, once

    def mend(self) -> None:
        self._requests_left = self._bytes_left = None
        self.is_cut = False

    def force(self, pattern: str, status: int, message: str = "", **more: Any) -> None:
        self.forced.append(Forced(pattern, status, message, **more))

    def begin_request(self) -> bool:
        """Count a request; True where it is to be done and its answer lost. Raises Cut."""
        with self._lock:
            if self.is_cut:
                raise Cut
            if self._requests_left is None:
                return False
            self._requests_left -= 1
            if self._requests_left >= 0:
                return False
            self._spent()
            if not self._after:
                raise Cut
            return True

    def count_bytes(self, data: bytes) -> None:
        with self._lock:
            self.received += data
            if self.is_cut and not self._after:
                raise Cut
            if self._bytes_left is not None:
                self._bytes_left -= len(data)
                if self._bytes_left <= 0:
                    self._spent()
                    raise Cut

    def _spent(self) -> None:
        self._requests_left = self._bytes_left = None
        self.is_cut = not self.once

    # ---- state

    def repo_dir(self, repo: str) -> Path:
        return self.root / repo

    def load(self, repo: str) -> dict[str, Any] | None:
        path = self.repo_dir(repo) / "repo.json"
        return json.loads(path.read_text()) if path.exists() else None

    def store(self, repo: str, state: dict[str, Any]) -> None:
        path = self.repo_dir(repo) / "repo.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_suffix(".tmp")
        temp.write_text(json.dumps(state))
        temp.replace(path)

    def make(self, repo: str, *, private: bool, files: dict[str, bytes] | None = None) -> str:
        """A repository as if somebody had made it; its commit."""
        entries = {name: self._keep(repo, name, data) for name, data in (files or {}).items()}
        entries[".gitattributes"] = self._keep(repo, ".gitattributes", b"*.safetensors filter=lfs\n")
        state = {"private": private, "commits": {}, "main": "", "tags": {}}
        oid = self._add_commit(state, entries, "initial commit")
        self.store(repo, state)
        return oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """{path: content} at a branch, tag or commit."""
        state = self.load(repo)
        assert state is not None
        commit = self._commit_of(state, revision)
        assert commit is not None, revision
        found = state["commits"][commit]["files"]
        return {path: self._content(repo, entry) for path, entry in found.items()}

    def tags(self, repo: str) -> dict[str, str]:
        return (self.load(repo) or {"tags": {}})["tags"]

    def _keep(self, repo: str, name: str, data: bytes) -> dict[str, Any]:
        if _is_lfs(name, len(data)):
            oid = hashlib.sha256(data).hexdigest()
            _write(self.repo_dir(repo) / "lfs" / oid, data)
            return _lfs_entry(oid, len(data))
        oid = _git_oid(data)
        _write(self.repo_dir(repo) / "blobs" / oid, data)
        return {"oid": oid, "size": len(data)}

    def _content(self, repo: str, entry: dict[str, Any]) -> bytes:
        place = ("lfs", entry["lfs"]) if "lfs" in entry else ("blobs", entry["oid"])
        return self.repo_dir(repo).joinpath(*place).read_bytes()

    def _commit_of(self, state: dict[str, Any], revision: str) -> str | None:
        if revision == "main":
            return str(state["main"])
        if revision in state["tags"]:
            return str(state["tags"][revision])
        return revision if revision in state["commits"] else None

    def _add_commit(self, state: dict[str, Any], files: dict[str, Any], title: str) -> str:
        text = json.dumps([state["main"], files, title, len(state["commits"])])
        oid = hashlib.sha1(text.encode()).hexdigest()
        state["commits"][oid] = {"parent": state["main"], "title": title, "files": files}
        state["main"] = oid
        return oid

    def _used(self, owner: str) -> int:
        places = (self.root / owner).glob("*/lfs/*")
        return sum(place.stat().st_size for place in places)

    # ---- answers

    def answer(self, method: str, target: str, headers: Any, body: Callable[[], bytes]) -> Reply:
        url = urllib.parse.urlsplit(target)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        data = body()
        with self._lock:
            words = f"{method} {path}"
            self.requests.append(words)
            for forced in self.forced:
                if forced.times > 0 and re.search(forced.pattern, words):
                    forced.times -= 1
                    if forced.after:
                        self._route(method, path, query, headers, data)
                    return _error(forced.status, forced.message, **forced.headers)
            return self._route(method, path, query, headers, data)

    def _route(self, method: str, path: str, query: Any, headers: Any, data: bytes) -> Reply:
        account = self.accounts.get((headers.get("Authorization") or "").removeprefix("Bearer "))
        routes: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/repos/create", self._create),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/auth-check", lambda a, q, d, repo: _json({})),
            ("GET", r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", self._tag),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs-put/([^/]+/[^/]+)/([0-9a-f]{64})(?:/(\d+))?", self._put),
            ("POST", r"/lfs-done/([^/]+/[^/]+)/([0-9a-f]{64})", self._complete),
            ("POST", r"/lfs-verify/([^/]+/[^/]+)", self._verify),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for verb, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and verb == ("GET" if method == "HEAD" else method):
                return answer(account, query, data, *match.groups())
        return _error(404, "no such page")

    def _whoami(self, account: Account | None, query: Any, data: bytes) -> Reply:
        if account is None:
            return _error(401, "Invalid credentials in Authorization header")
        token: dict[str, Any] = {"displayName": "t", "role": account.role}
        if account.role == "fineGrained":
            scoped = [
                {"entity": {"type": "user", "name": name}, "permissions": ["repo.write"]}
                for name in account.scopes
            ]
            token["fineGrained"] = {"scoped": scoped}
        orgs = [{"name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        return _json({"type": "user", "name": account.name, "orgs": orgs, "auth": {"accessToken": token}})

    def _validate(self, account: Account | None, query: Any, data: bytes) -> Reply:
        text = json.loads(data)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            front = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError:
            front = None
        wrong = []
        if not isinstance(front, dict):
            wrong.append("the front matter is no mapping")
        else:
            base = front.get("base_model")
            if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                wrong.append('"base_model" is not valid')
            if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(front.get("license", "other"))):
                wrong.append('"license" must be one of the list')
        errors = [{"message": message} for message in wrong]
        return _json({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def _may_write(self, account: Account | None, repo: str) -> bool:
        if account is None or account.role == "read":
            return False
        owner = repo.partition("/")[0]
        if account.role == "fineGrained":
            return bool({owner, repo} & set(account.scopes))
        return owner == account.name or account.orgs.get(owner) in ("admin", "write", "contributor")

    def _may_read(self, account: Account | None, repo: str, state: dict[str, Any]) -> bool:
        if not state["private"]:
            return True
        return account is not None and repo.partition("/")[0] in {account.name, *account.orgs}

    def _open(
        self, account: Account | None, repo: str, *, write: bool = False
    ) -> tuple[dict[str, Any] | None, Reply]:
        state = self.load(repo)
        if state is None or not self._may_read(account, repo, state) or repo in self.reserved:
            missing = 404 if account else 401
            return None, _error(missing, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if write and not self._may_write(account, repo):
            return None, _error(
                403 if account else 401, f"you need write access to {repo}; check your token's permissions"
            )
        return state, (200, b"", {})

    def _create(self, account: Account | None, query: Any, data: bytes) -> Reply:
        asked = json.loads(data)
        if account is None:
            return _error(401, "Invalid username or password.")
        repo = f"{asked.get('organization') or account.name}/{asked['name']}"
        if not NAME.fullmatch(asked["name"]):
            return _error(400, "Invalid repo name")
        if not self._may_write(account, repo):
            return _error(403, f"You don't have the rights to create a model under the namespace {repo}")
        if repo in self.reserved or self.load(repo) is not None:
            return _error(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.make(repo, private=private)
        return _json({"url": f"{self.url}/{repo}", "name": repo})

    def _info(
        self, account: Account | None, query: Any, data: bytes, repo: str, revision: str | None
    ) -> Reply:
        state, refused = self._open(account, repo)
        if state is None:
            return refused
        commit = self._commit_of(state, revision or "main")
        if commit is None:
            return _error(404, "Revision not found", **{"X-Error-Code": "RevisionNotFound"})
        files = state["commits"][commit]["files"]
        siblings = [{"rfilename": path, "size": entry["size"]} for path, entry in files.items()]
        return _json(
            {
                "id": repo, "sha": commit, "private": state["private"], "gated": False, "disabled": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
            }
        )  # fmt: skip

    def _refs(self, account: Account | None, query: Any, data: bytes, repo: str) -> Reply:
        state, refused = self._open(account, repo)
        if state is None:
            return refused
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": state["main"]}]
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in state["tags"].items()
        ]
        return _json({"branches": branches, "converts": [], "tags": tags})

    def _tree(
        self, account: Account | None, query: Any, data: bytes, repo: str, revision: str, under: str | None
    ) -> Reply:
        state, refused = self._open(account, repo)
        if state is None:
            return refused
        commit = self._commit_of(state, revision)
        if commit is None:
            return _error(404, "Revision not found", **{"X-Error-Code": "RevisionNotFound"})
        shown = []
        for path, entry in state["commits"][commit]["files"].items():
            item = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
            if "lfs" in entry:
                item["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 134}
            shown.append(item)
        return _json(shown)

    def _preupload(self, account: Account | None, query: Any, data: bytes, repo: str, revision: str) -> Reply:
        state, refused = self._open(account, repo, write=True)
        if state is None:
            return refused
        files = state["commits"][state["main"]]["files"]
        told = []
        for asked in json.loads(data)["files"]:
            entry = files.get(asked["path"], {})
            told.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if _is_lfs(asked["path"], asked["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": entry.get("lfs") or entry.get("oid"),
                }
            )
        return _json({"files": told})

    def _batch(self, account: Account | None, query: Any, data: bytes, repo: str) -> Reply:
        state, refused = self._open(account, repo, write=True)
        if state is None:
            return refused
        asked = json.loads(data)["objects"]
        new = sum(item["size"] for item in asked)
        if self.quota_bytes is not None and self._used(repo.partition("/")[0]) + new > self.quota_bytes:
            return _error(403, "Private repository storage limit reached, please upgrade your plan")
        objects = []
        for item in asked:
            oid, size = item["oid"], item["size"]
            told: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if not (self.repo_dir(repo) / "lfs" / oid).exists():
                upload: dict[str, Any] = {"href": f"{self.url}/lfs-put/{repo}/{oid}"}
                if self.multipart_bytes and size > self.multipart_bytes:
                    count = -(-size // self.multipart_bytes)
                    parts = {str(i + 1): f"{self.url}/lfs-put/{repo}/{oid}/{i + 1}" for i in range(count)}
                    upload = {
                        "href": f"{self.url}/lfs-done/{repo}/{oid}",
                        "header": {"chunk_size": str(self.multipart_bytes), **parts},
                    }
                verify = {"href": f"{self.url}/lfs-verify/{repo}", "header": {}}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        return _json({"transfer": "basic", "objects": objects})

    def _put(self, account: Any, query: Any, data: bytes, repo: str, oid: str, part: str | None) -> Reply:
        if part is not None:
            _write(self.repo_dir(repo) / "parts" / f"{oid}-{part}", data)
            return 200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        if hashlib.sha256(data).hexdigest() != oid:
            return _error(400, "the content does not match its oid")
        _write(self.repo_dir(repo) / "lfs" / oid, data)
        return 200, b"", {}

    def _complete(self, account: Any, query: Any, data: bytes, repo: str, oid: str) -> Reply:
        parts = [part["partNumber"] for part in json.loads(data)["parts"]]
        found = [(self.repo_dir(repo) / "parts" / f"{oid}-{number}").read_bytes() for number in parts]
        return self._put(account, query, b"".join(found), repo, oid, None)

    def _verify(self, account: Account | None, query: Any, data: bytes, repo: str) -> Reply:
        asked = json.loads(data)
        place = self.repo_dir(repo) / "lfs" / asked["oid"]
        if not place.exists() or place.stat().st_size != asked["size"]:
            return _error(404, "no such object")
        return _json({})

    def _commit(self, account: Account | None, query: Any, data: bytes, repo: str, revision: str) -> Reply:
        state, refused = self._open(account, repo, write=True)
        if state is None:
            return refused
        lines = [json.loads(line) for line in data.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, state["main"]):
            return _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(state["commits"][state["main"]]["files"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self._keep(repo, value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (self.repo_dir(repo) / "lfs" / value["oid"]).exists():
                    return _error(400, "an LFS pointer points to a file that does not exist")
                files[value["path"]] = _lfs_entry(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return _error(404, "no such entry", **{"X-Error-Code": "EntryNotFound"})
                del files[value["path"]]
        oid = self._add_commit(state, files, head["summary"])
        self.store(repo, state)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _tag(self, account: Account | None, query: Any, data: bytes, repo: str, revision: str) -> Reply:
        state, refused = self._open(account, repo, write=True)
        if state is None:
            return refused
        tag, commit = json.loads(data)["tag"], self._commit_of(state, revision)
        if commit is None:
            return _error(404, "Revision not found", **{"X-Error-Code": "RevisionNotFound"})
        if tag in state["tags"]:
            return _error(409, "Tag reference exists already")
        state["tags"][tag] = commit
        self.store(repo, state)
        return _json({})

    def _resolve(
        self, account: Account | None, query: Any, data: bytes, repo: str, revision: str, path: str
    ) -> Reply:
        state, refused = self._open(account, repo)
        if state is None:
            return refused
        commit = self._commit_of(state, revision)
        if commit is None:
            return _error(404, "Revision not found", **{"X-Error-Code": "RevisionNotFound"})
        entry = state["commits"][commit]["files"].get(path)
        if entry is None:
            return _error(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        etag = entry.get("lfs") or entry["oid"]
        return 200, self._content(repo, entry), {"ETag": f'"{etag}"', "X-Repo-Commit": commit}


@contextmanager
def serve_hub(hub: HubServer) -> Iterator[HubServer]:
    """The server on a port of its own while the block lasts; `hub.url` is what HF_ENDPOINT takes."""

    class Handler(QuietHandler):
        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                return b"".join(self._chunks())
            left, found = int(self.headers.get("Content-Length", 0)), []
            while left:
                block = self.rfile.read(min(left, BLOCK))
                if not block:
                    raise Cut
                left -= len(block)
                hub.count_bytes(block)
                found.append(block)
            return b"".join(found)

        def _chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline().split(b";")[0], 16):
                block = self.rfile.read(size)
                hub.count_bytes(block)
                yield block
                self.rfile.readline()
            self.rfile.readline()

        def answer(self) -> None:
            try:
                is_lost = hub.begin_request()
                shown = [f"{k}: {v}" for k, v in self.headers.items() if k.lower() != "authorization"]
                hub.count_bytes("\n".join([self.path, *shown]).encode())
                status, body, headers = hub.answer(self.command, self.path, self.headers, self._body)
                if is_lost:
                    raise Cut
            except Cut:
                hub.cuts.append(f"{self.command} {self.path}")
                self.close_connection = True
                return
            self.reply(status, body, headers)

    with http_server(Handler) as hub.url:
        yield hub


def _is_lfs(name: str, size: int) -> bool:
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size >= LFS_FROM_BYTES)


def _lfs_entry(sha256: str, size: int) -> dict[str, Any]:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return {"oid": _git_oid(pointer.encode()), "size": size, "lfs": sha256}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + ".tmp")
    temp.write_bytes(data)
    temp.replace(path)


def _json(value: Any, status: int = 200) -> Reply:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _error(status: int, message: str, **headers: str) -> Reply:
    told = {"X-Error-Message": message} if message else {}
    _, body, kind = _json({"error": message})
    return status, body, {**kind, **told, **headers}
