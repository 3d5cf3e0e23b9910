"""A proxy in front of an HTTP server that does to single requests what networks and busy servers do."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Literal

from tests.servers import http_server

Fault = Literal[
    "500", "503", "429", "cut request", "cut answer", "lost answer", "wrong etag", "flipped", "short", "hold"
]
"""cut request: the connection ends before the request is passed on; lost answer: after it was; cut answer: in the
middle of the body; flipped, short: a body of other bytes; hold: no answer until `release`."""


@dataclass
class Faults:
    """Which requests meet what: (method, part of the path and query, fault, how many of them are spared first)."""

    plan: list[tuple[str, str, Fault, int]] = field(default_factory=list)
    met: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    release: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for place, (wanted, part, fault, spared) in enumerate(self.plan):
                if wanted == method and part in path:
                    if spared:
                        self.plan[place] = (wanted, part, fault, spared - 1)
                        return None
                    del self.plan[place]
                    self.met.append(fault)
                    return fault
        return None


@contextmanager
def faulty_proxy(host: str, port: int) -> Iterator[Faults]:
    """Pass HTTP on to host:port, but for what `plan` says; at `url`."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def handle_any(self) -> None:
            fault = faults.next(self.command, self.path)
            self.close_connection = fault is not None
            if fault == "cut request":
                self.connection.close()
                return
            if self.headers.get("Expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "hold":
                faults.held.set()
                faults.release.wait(60)
                return
            if fault in ("500", "503", "429"):
                self.answer(int(fault), {"Retry-After": "0"}, b"<Error><Code>Busy</Code></Error>")
                return
            status, headers, answer = self.passed_on(body)
            if fault == "lost answer":
                self.connection.close()
            elif fault == "wrong etag":
                self.answer(status, {**headers, "ETag": '"' + "0" * 32 + '"'}, answer)
            elif fault == "flipped":
                self.answer(status, headers, bytes([answer[0] ^ 1]) + answer[1:])
            elif fault == "short":
                self.answer(status, headers, answer[: len(answer) // 2])
            else:
                self.answer(status, headers, answer, cut=fault == "cut answer")

        def passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            upstream = http.client.HTTPConnection(host, port, timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() not in ("connection", "expect"):
                    upstream.putheader(key, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            answer = response.read()
            headers = {key: value for key, value in response.getheaders() if key.lower() not in _OWN}
            if self.command == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length") or "0"
            upstream.close()
            return response.status, headers, answer

        def answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 - the names that the server looks for

    with http_server(Handler) as faults.url:
        try:
            yield faults
        finally:
            faults.release.set()


_OWN = ("connection", "content-length", "transfer-encoding", "date", "server")
