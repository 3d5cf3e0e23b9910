"""A server that answers in vLLM's format, for what the real one cannot be made to do; standard library only.

What it answers is a function of its weights, the prompt and the seed. FAKE_VLLM, in its environment, holds in JSON
what goes wrong; it writes the calls that it gets to `calls.jsonl` in the directory that FAKE_VLLM_CALLS names.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAKE_VLLM", "{}"))
END = 7
"""The token that most of its answers end with."""


def install(directory: Path) -> Path:
    """Make a directory for PYTHONPATH in which `python -m vllm.entrypoints.openai.api_server` is this server."""
    package = directory / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        f"import runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    return directory


def answer(weights: str, prompt: list[int], seed: int, length: int) -> list[int]:
    """Tokens from 100 up; the end token closes all but every fourth answer."""
    digest = hashlib.sha256(json.dumps([weights, prompt, seed]).encode()).digest()
    tokens = [100 + byte for byte in digest[: 1 + digest[0] % 6]]
    return [*tokens, END][:length] if digest[1] % 4 else (tokens * length)[:length]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class State:
    def __init__(self, model: Path) -> None:
        self.lock = threading.Lock()
        self.tensors = {file.name: digest(file) for file in sorted(model.glob("*.safetensors"))}
        self.version = "default"
        self.answers = self.running = self.most_running = 0
        self.away: set[str] = set()
        """What sleeps: weights, kv_cache."""
        self.stale = False
        """The prefix cache holds what earlier weights computed."""

    @property
    def weights(self) -> str:
        return json.dumps(self.tensors)

    def load(self, directory: Path) -> None:
        kept = FAULTS.get("does_not_load", [])
        for name in self.tensors:
            if name not in kept:
                self.tensors[name] = digest(directory / name)
        self.stale = True


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_GET(self) -> None:
        match self.path:
            case "/health":
                self.reply(None)
            case "/version":
                self.reply({"version": FAULTS.get("version", "0.32.0")})
            case "/v1/models":
                self.reply({"data": [{"id": "student", "max_model_len": FAULTS.get("max_model_len", 4096)}]})
            case "/weight_info" if not FAULTS.get("no_dev_mode"):
                self.reply({"weight_version": self.state.version})
            case _:
                self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        self.note(body)
        url, state = urlsplit(self.path), self.state
        match url.path:
            case "/v1/completions":
                self.complete(body)
            case "/collective_rpc":
                assert body["method"] == "reload_weights" and "weights" not in state.away
                if FAULTS.get("refuses_weights"):
                    return self.refuse(500, "EngineCore encountered an issue. See stack trace (above)")
                state.load(Path(body["kwargs"]["weights_path"]))
                self.reply({"results": [None]})
            case "/reset_prefix_cache":
                state.stale = False
                self.reply({"success": not FAULTS.get("keeps_prefixes")})
            case "/update_weight_version":
                state.version = body["new_version"]
                self.reply({"success": True, "new_version": state.version})
            case "/weight_checker" if body["action"] == "reset":
                state.tensors = dict.fromkeys(state.tensors, "zero")
                self.reply({"status": "reset"})
            case "/weight_checker":
                prefix = "dp0:pp0:pcp0:tp0:"
                held = dict(state.tensors)
                if FAULTS.get("packed"):
                    held["packed"] = hashlib.sha256().hexdigest()
                self.reply({"checksums": {prefix + name: value for name, value in held.items()}})
            case "/sleep":
                state.away = {"weights", "kv_cache"}
                state.tensors = dict.fromkeys(state.tensors, "gone")
                self.reply({"status": "sleeping", "level": 2})
            case "/wake_up":
                state.away -= set(parse_qs(url.query)["tags"])
                self.reply({"status": "sleeping" if state.away else "awake"})
            case _:
                self.reply({"detail": "Not Found"}, 404)
        return None

    def complete(self, body: dict[str, Any]) -> None:
        state = self.state
        if state.away or state.stale:
            return self.refuse(500, f"away: {sorted(state.away)}, stale: {state.stale}")
        with state.lock:
            state.answers += 1
            number = state.answers
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        if number == FAULTS.get("dies_at"):
            print("RuntimeError: something of the engine", flush=True)
            os._exit(3)
        if number == FAULTS.get("breaks_at"):
            return self.connection.shutdown(socket.SHUT_RDWR)
        if number == FAULTS.get("forgets_at"):
            state.version = "default"
        time.sleep(FAULTS.get("takes_s", 0))
        tokens = answer(state.weights, body["prompt"], body["seed"], body["max_tokens"])
        ended = tokens[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "",
            "logprobs": None,
            "finish_reason": "stop" if ended else "length",
            "stop_reason": tokens[-1] if ended else None,
            "token_ids": tokens,
            "prompt_logprobs": None,
            "prompt_token_ids": body["prompt"],
        }
        choice |= FAULTS.get("choice", {})
        with state.lock:
            state.running -= 1
        self.reply({"id": "cmpl-1", "object": "text_completion", "model": "student", "choices": [choice]})
        return None

    def note(self, body: object) -> None:
        if directory := os.environ.get("FAKE_VLLM_CALLS"):
            with self.state.lock, open(Path(directory) / "calls.jsonl", "a") as file:
                file.write(json.dumps([self.path, body, self.state.running]) + "\n")

    def reply(self, content: object, status: int = 200) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        self.reply(
            {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}},
            status,
        )

    def address_string(self) -> str:
        return "client"  # a socket of the file system has none

    def log_message(self, format: str, *args: object) -> None:
        pass


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads, request_queue_size = True, 128


class PortServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True


def main(arguments: list[str]) -> None:
    options = dict(part.removeprefix("--").partition("=")[::2] for part in arguments)
    if directory := os.environ.get("FAKE_VLLM_CALLS"):
        seen = {
            name: os.environ.get(name) for name in ("RANK", "CUDA_VISIBLE_DEVICES", "VLLM_SERVER_DEV_MODE")
        }
        (Path(directory) / "start.json").write_text(json.dumps([arguments, seen, os.getpid()]))
    if lines := FAULTS.get("fails_with"):
        print("\n".join(lines), flush=True)
        sys.exit(1)
    time.sleep(FAULTS.get("starts_in_s", 0))
    Handler.state = State(Path(options["model"]))
    with (
        UnixServer(options["uds"], Handler)
        if "uds" in options
        else PortServer(("127.0.0.1", int(options["port"])), Handler) as server
    ):
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
