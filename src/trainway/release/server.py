"""A small server of OpenAI's API over `Speaker`: one model, one answer at a time, standard library only."""

from __future__ import annotations

import hmac
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from trainway.errors import ConfigError, EnvironmentFault
from trainway.release.generate import Answer, Speaker
from trainway.release.openai_api import ApiError, Asked, Reply, model_entry, model_list, read_request

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_BODY = 16 << 20
_MAX_WAITING = 64
"""Requests that are answered or wait for it; more are told to come again."""
_IDLE_S = 600.0


class ApiServer(ThreadingHTTPServer):
    """Listens from the start; `serve_forever` answers, `shutdown` ends it.

    key: what a request must show, where there is one. host: of a loopback address only requests that name it are
    answered, so that no page in a browser reaches the server by a name of its own.

    Raises EnvironmentFault when the address cannot be listened at.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, speaker: Speaker, name: str, key: str | None = None) -> None:
        self.speaker, self.name, self.key = speaker, name, key
        self.created = int(time.time())
        self.places = threading.BoundedSemaphore(_MAX_WAITING)
        self.hosts = LOOPBACK if host in LOOPBACK else None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise cannot_listen(host, port, error) from None

    @property
    def url(self) -> str:
        """What clients take as base_url."""
        host, port = self.server_address[:2]
        text = str(host)
        return f"http://{f'[{text}]' if ':' in text else text}:{port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; anything else is said in the log, with its traceback."""
        log.debug("a connection ended", exc_info=True)


def cannot_listen(host: str, port: int, error: Exception) -> EnvironmentFault:
    """That nobody can listen there, and why."""
    why = getattr(error, "strerror", None) or str(error)
    return EnvironmentFault(f"cannot listen at {host}:{port}", why, "choose another --port or --host")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "trainway", ""
    timeout = _IDLE_S
    server: ApiServer

    def do_GET(self) -> None:
        server = self.server
        path = urlsplit(self.path).path
        if path == "/health":
            self._send(200, {})
            return
        try:
            self._check(path)
            if path == "/v1/models":
                self._send(200, model_list(server.name, server.created, server.speaker.context))
            elif path == f"/v1/models/{server.name}":
                self._send(200, model_entry(server.name, server.created, server.speaker.context))
            else:
                raise ApiError(404, f"there is no {path:.200}")
        except ApiError as error:
            self._send(error.status, error.body())

    def do_POST(self) -> None:
        began = False
        try:
            path = urlsplit(self.path).path
            kinds = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
            body = self._body()
            self._check(path)
            if path not in kinds:
                raise ApiError(404, f"there is no {path:.200}")
            asked = read_request(kinds[path], body, self.server.speaker, self.server.name)  # type: ignore[arg-type]
            if not self.server.places.acquire(blocking=False):
                raise ApiError(503, f"{_MAX_WAITING} requests wait already: try again later", code="busy")
            try:
                began = asked.stream
                self._answer(asked)
            finally:
                self.server.places.release()
        except ApiError as error:
            self._send(error.status, error.body())
        except ConfigError as error:
            said = ApiError(400, ": ".join(part for part in (error.what, error.why) if part))
            self._send(said.status, said.body())
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # nobody is there any more
        except Exception as error:  # a request must not end the server
            log.exception("a request failed")
            if began:  # its answer has begun: it cannot become an error now, only end
                self.close_connection = True
                return
            said = ApiError(500, f"{type(error).__name__}: {error}"[:500])
            self._send(said.status, said.body())

    # ---- requests

    def _check(self, path: str) -> None:
        hosts, key = self.server.hosts, self.server.key
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if hosts is not None and host not in hosts:
            raise ApiError(403, f"the server is not {host!r:.200}")
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(shown.encode(), key.encode()):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def _body(self) -> object:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > _MAX_BODY:
            self.close_connection = True  # what is on its way is not read
            raise ApiError(
                413 if size.isdecimal() else 411, f"the body may have {_MAX_BODY} bytes, and says so"
            )
        content = self.rfile.read(int(size))
        if self.headers.get_content_type() != "application/json":  # what a page may send unasked
            raise ApiError(415, "the body must be application/json")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is no JSON") from None

    # ---- answers

    def _answer(self, asked: Asked) -> None:
        reply = Reply(asked, self.server.name)
        if asked.stream:
            self._stream(asked, reply)
            return
        answers = [piece for _, piece in self._pieces(asked) if isinstance(piece, Answer)]
        self._send(200, reply.whole(answers))

    def _stream(self, asked: Asked, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if opening := reply.opening():
            self._event(json.dumps(opening))
        answers = []
        for index, piece in self._pieces(asked):
            if isinstance(piece, Answer):
                answers.append(piece)
                self._event(json.dumps(reply.ending(index, piece)))
            else:
                self._event(json.dumps(reply.piece(index, piece)))
        if asked.include_usage:
            self._event(json.dumps(reply.usage(answers)))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _pieces(self, asked: Asked) -> Iterator[tuple[int, str | Answer]]:
        """Of each prompt in turn; ConnectionError when the client has gone."""
        for index, prompt in enumerate(asked.prompts):
            stream = self.server.speaker.stream(prompt, asked.decoding)
            try:
                for piece in stream:
                    if self._is_gone():
                        raise ConnectionError
                    yield index, piece
            finally:
                stream.close()  # ends the generation, too

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        with suppress(BlockingIOError):
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        return False

    def _event(self, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def _send(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        with suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            if status == HTTPStatus.UNAUTHORIZED:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        # what clients send is not to steer a terminal
        log.info("%s", (format % args).encode("unicode_escape").decode())
