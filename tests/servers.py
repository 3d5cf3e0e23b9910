"""Servers on ports of 127.0.0.1 that live as long as a block."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietHandler(BaseHTTPRequestHandler):
    """Answers over connections that stay, and tells nobody."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        """Called for a request of any method; ends in `reply`."""
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - the names that the server looks for

    def reply(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *, cut: bool = False
    ) -> None:
        """Send an answer; of a body that was found, the part that `Range` asks for. cut: the connection ends halfway."""
        told = dict(headers or {})
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and span:
            total, first = len(body), int(span[1])
            body = body[first : int(span[2]) + 1 if span[2] else None]
            told["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{total}"
            status = 206
        self.send_response(status)
        for name, value in told.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, or was killed, is no news."""


@contextmanager
def http_server(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address, http://127.0.0.1:PORT, at which `handler` answers, a thread for each connection."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def tcp_server(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """The port at which each connection is answered once, and closed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                with line:
                    line.sendall(answer(line.recv(1 << 16)))

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
