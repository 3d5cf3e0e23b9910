"""The board's web server: GET and HEAD alone, for this machine, from the standard library."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import logging
import re
import socket
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from trainway.board.detail import Details
from trainway.board.runs import RunWatch
from trainway.board.watch import Board
from trainway.errors import EnvironmentFault
from trainway.report.html import STATIC, static_text

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 64
IDLE_S = 75.0
"""After which a connection without a request is closed: more than a page in the background waits between two."""
SQUEEZED_BYTES = 2048
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
"""Of every answer."""
OWN_STATIC = (
    "board.css",
    "board.js",
    "format.js",
    "list.js",
    "curves.js",
    "run.js",
    "compare.js",
    "icon.svg",
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_RUN = re.compile(r"/api/runs/([0-9a-f]{16})(?:/(series|log))?")
_TOKEN = re.compile(r"[0-9a-f.]{0,40}|none\.0")


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    status: HTTPStatus
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    tag: str = ""
    """Names this state of the body, for If-None-Match."""


class BoardServer(ThreadingHTTPServer):
    """Listens on one address; a thread for each connection, at most `MOST_CONNECTIONS`."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, board: Board, host: str, port: int) -> None:
        """Raises EnvironmentFault when the address is not this machine's, or the port is in use."""
        family, address = _resolve(host, port)
        self.address_family = family
        self.routes = Routes(board)
        self.hosts = known_hosts(host)
        self.is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((address, port), _Handler)
        except PermissionError:
            raise EnvironmentFault(
                f"port {port} may not be used",
                "ports below 1024 are the system's",
                "take another: --port 7007",
            ) from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise _no_address(host, str(error.strerror)) from None
            raise EnvironmentFault(
                f"port {port} is in use on {host}",
                f"another program listens there ({error.strerror})",
                f"end it, or take another: --port {_free_port(family, address, port)}",
            ) from None

    @property
    def url(self) -> str:
        """For a browser on this machine."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def server_bind(self) -> None:
        # the standard library's asks the name service who we are, which may take long and is needed for nothing
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection ended", exc_info=True)  # a page that was closed in mid-answer is no event


class Routes:
    """From a path to an answer. What a request names is looked up, and never part of a path on the disk."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._details = Details(board.place, board.masker)
        self._static = _static_answers()

    def answer(self, path: str, query: str) -> Answer:
        """Of a GET."""
        if path in self._static:
            return self._static[path]
        since = parse_qs(query, max_num_fields=4).get("since", [""])[-1]
        if not _TOKEN.fullmatch(since):
            since = ""
        if path == "/api/runs":
            return _json(*self._board.runs(since))
        found = _RUN.fullmatch(path)
        run = self._board.find(found[1]) if found else None
        if found is None or run is None:
            return Answer(HTTPStatus.NOT_FOUND, b"there is nothing of this name\n")
        return self._of_run(run, found[2], since)

    def _of_run(self, run: RunWatch, part: str | None, since: str) -> Answer:
        if part == "series":
            return _json(*self._board.charts.read(run.id, run.run.metrics, since))
        read: Callable[[RunWatch, str], tuple[str, dict[str, Any] | None]]
        read = self._details.log if part == "log" else self._details.describe
        token, found = read(run, since)
        return _json(token, found if found is not None else {"same": True})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "trainway", ""
    timeout = IDLE_S
    server: BoardServer

    def do_GET(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # nobody reads that body: what follows it is no request
        try:
            answer = self._refusal() or self._found()
        except Exception:  # a fault of ours ends one answer, never the board
            log.exception("no answer to %s", self.path[:200])
            answer = Answer(
                HTTPStatus.INTERNAL_SERVER_ERROR, b"the board has failed to answer; see its log\n"
            )
        self._send(answer)

    def do_HEAD(self) -> None:
        self.do_GET()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command in ("GET", "HEAD"):
            return True
        self.close_connection = True  # whatever body it has is not read
        self._send(Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"the board only shows: GET and HEAD\n"))
        return False

    def _refusal(self) -> Answer | None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.hosts(hosts[0]):
            return Answer(HTTPStatus.MISDIRECTED_REQUEST, b"the board does not answer to this name\n")
        site = self.headers.get("Sec-Fetch-Site", "none")
        follows_link = self.headers.get("Sec-Fetch-Mode") == "navigate" and self.path.partition("?")[0] == "/"
        if site not in ("same-origin", "none") and not follows_link:
            return Answer(HTTPStatus.FORBIDDEN, b"the board answers no other page\n")
        return None

    def _found(self) -> Answer:
        try:
            parts = urlsplit(self.path)
        except ValueError:
            return Answer(HTTPStatus.BAD_REQUEST, b"no address\n")
        if parts.scheme or parts.netloc:
            return Answer(HTTPStatus.BAD_REQUEST, b"no address of this board\n")
        return self.server.routes.answer(parts.path, parts.query)

    def _send(self, answer: Answer) -> None:
        tag, body, status = f'"{answer.tag}"' if answer.tag else "", answer.body, answer.status
        if tag and self.headers.get("If-None-Match") == tag:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        squeezed = len(body) > SQUEEZED_BYTES and "gzip" in self.headers.get("Accept-Encoding", "")
        if squeezed:
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)
            body = packer.compress(body) + packer.flush()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if tag:
            self.send_header("ETag", tag)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if squeezed:
            self.send_header("Content-Encoding", "gzip")
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Vary", "Accept-Encoding")
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and body:
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # malformed requests end here, before there are headers to look at; the standard page would repeat them
        self.close_connection = True
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Length": "0", "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)


def known_hosts(host: str) -> Callable[[str], bool]:
    """Which Host headers are answered, when listening on `host`.

    A page of another site can have its own name point at this machine and then read what we send to it (DNS
    rebinding); it cannot make an address of digits its own.
    """
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    names = {"localhost"} if is_local else {"localhost", host.lower(), socket.gethostname().lower()}

    def known(header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname or ""
            urlsplit(f"//{header}").port  # noqa: B018 - raises for what is no port
        except ValueError:
            return False
        if not re.fullmatch(r"[\w.\-]+(:\d+)?|\[[0-9a-fA-F:.%]+\](:\d+)?", header):
            return False
        if name in names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_local

    return known


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise _no_address(host, getattr(error, "strerror", None) or str(error)) from None
    family, _, _, _, address = found[0]
    return family, str(address[0])


def _no_address(host: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{host} is no address of this machine",
        why,
        "leave --host out, or give one of this machine's addresses",
    )


def _free_port(family: socket.AddressFamily, address: str, port: int) -> int:
    for candidate in range(port + 1, min(port + 100, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind((address, candidate))
            return candidate
    return 0  # the system chooses


def _json(token: str, found: dict[str, Any]) -> Answer:
    body = json.dumps({"token": token, **found}, separators=(",", ":"), allow_nan=False)
    return Answer(HTTPStatus.OK, body.encode(), "application/json", token)


def _static_answers() -> dict[str, Answer]:
    own = resources.files("trainway.board").joinpath("static")
    texts = {f"/static/{name}": static_text(name) for name in STATIC}
    texts |= {f"/static/{name}": own.joinpath(name).read_text(encoding="utf-8") for name in OWN_STATIC}
    texts["/"] = own.joinpath("index.html").read_text(encoding="utf-8")
    answers = {}
    for path, text in texts.items():
        body = text.encode()
        kind = _TYPES[path.rpartition(".")[2] if "." in path else "html"]
        answers[path] = Answer(HTTPStatus.OK, body, kind, hashlib.sha256(body).hexdigest()[:16])
    answers["/favicon.ico"] = answers["/static/icon.svg"]
    return answers
