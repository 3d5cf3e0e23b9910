"""A vLLM server: how it is started beside the training, reached over HTTP, and what it says when it fails."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainway.errors import ConfigError, EnvironmentFault
from trainway.files import disk_faults
from trainway.rollout.keeper import Kept

PYTHON = "TRAINWAY_VLLM_PYTHON"
"""Names the interpreter that has vLLM, where that is not the one that trains."""
API_KEY = "VLLM_API_KEY"
"""vLLM's own variable for the key that a server asks for."""
START_S = 1800.0
"""Time that a server has to start: a large model is read, compiled and captured in CUDA graphs."""
ANSWER_S = 1800.0
"""Time that one request may take."""
LOG_LINES = 25
"""How much of its log a server that fails leaves in the error."""

_TRIES, _PAUSE_S = 4, 0.5  # of a request whose connection breaks; each pause is twice the one before
_SOCKET, _LOG = "socket", "log"
_MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
# what a launcher says to its ranks is not meant for the server, whose own processes would believe it
_OF_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "OMP_NUM_THREADS",
)


class VllmServer:
    """A server by its address: `unix:PATH` for one of this machine that the run has started, or a url.

    directory: where a started server keeps its socket and its log. kept: the server itself, in the process that
    started it.
    """

    def __init__(self, address: str, directory: Path | None = None, kept: Kept | None = None) -> None:
        self.address = address
        self._directory = directory
        self._kept = kept

    def call(self, path: str, body: object = None, *, get: bool = False, timeout_s: float = ANSWER_S) -> Any:
        """The server's answer to a POST request (`get`: to a GET), out of its JSON; None for an empty one.

        What breaks a connection is tried again; what the server says is taken as final.

        Raises:
            EnvironmentFault: the server cannot be reached, has ended, takes too long, or refuses.
        """
        pause = _PAUSE_S
        for attempt in range(_TRIES):
            try:
                status, content = self._request("GET" if get else "POST", path, body, timeout_s)
                break
            except TimeoutError:
                raise self.fault(f"did not answer {path} within {timeout_s:.0f} s", log=True) from None
            except (OSError, http.client.HTTPException) as error:
                if attempt + 1 == _TRIES or self.has_ended:
                    reason = str(error) or type(error).__name__
                    raise self.fault(f"cannot be reached for {path}", reason, log=True) from None
            time.sleep(pause)
            pause *= 2
        if status != http.HTTPStatus.OK:
            raise self._refusal(path, status, content)
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise self.fault(f"answered {path} with something else than JSON: {content[:80]!r}") from None

    @property
    def has_ended(self) -> bool:
        """The process of a server that this one has started is gone."""
        return self._kept is not None and self._kept.exit_code() is not None

    def await_start(self) -> None:
        """Return when the server takes requests.

        Raises:
            EnvironmentFault: it has ended, or START_S are over.
        """
        began = time.monotonic()
        while not self._is_healthy():
            if self._kept is not None and (code := self._kept.exit_code()) is not None:
                raise self.fault(f"ended while it was starting (exit code {code})", log=True)
            if time.monotonic() - began > START_S:
                raise self.fault(f"did not start within {START_S:.0f} s", log=True)
            if self._kept is None:  # somebody else's: it runs already, or not at all
                self.call("/health", get=True)
            time.sleep(0.5)

    def close(self) -> None:
        """End the server and all its processes, where this process has started it."""
        if self._kept is not None:
            self._kept.close()

    def _is_healthy(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self._request("GET", "/health", None, 10.0)[0] == http.HTTPStatus.OK
        return False

    def _request(self, method: str, path: str, body: object, timeout_s: float) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        connection = _connection(self.address, timeout_s)
        try:
            prefix = "" if self.address.startswith("unix:") else urlsplit(self.address).path.rstrip("/")
            connection.request(method, prefix + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _refusal(self, path: str, status: int, content: bytes) -> EnvironmentFault:
        said = content.decode(errors="replace").strip()
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(said)["error"]["message"]
        failed = status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        return self.fault(f"refused {path} with status {status}", said[:1000], log=failed)

    def fault(self, what: str, why: str = "", fix: str = "", *, log: bool = False) -> EnvironmentFault:
        """An error that names the server; with the end of its log, where that is asked for and at hand."""
        lines = list(self._last_log_lines()) if log else []
        if lines:
            why = "\n".join([*([why] if why else []), "the end of its log:", *lines])
        return EnvironmentFault(
            f"the vLLM server at {self.address} {what}", why, fix or _cure("\n".join(lines))
        )

    def _last_log_lines(self) -> Iterator[str]:
        """What the log ends with, after the first error in it: the last one of vLLM only points back to that."""
        if self._directory is None:
            return
        with suppress(OSError):
            lines = (self._directory / _LOG).read_text(errors="replace").splitlines()
            last = lines[-LOG_LINES:]
            earlier = (line for line in lines[: -len(last)] if "Error: " in line)
            yield from (line[:400] for line in [*list(earlier)[:1], *last])


def start_server(
    model: Path, directory: Path, options: list[str], environment: Mapping[str, str]
) -> VllmServer:
    """Start a server for `model` that listens on a socket in `directory`, which is made, for this user alone.

    A socket of the file system, not a port: nobody else takes it meanwhile, and no other user of the machine reaches
    calls that replace weights.

    options: further ones of its command line; environment: for the server, beside this process's.

    Raises:
        EnvironmentFault: there is no such interpreter, or the directory cannot be made.
    """
    python = os.environ.get(PYTHON) or sys.executable
    if shutil.which(python) is None:
        raise EnvironmentFault(f"{PYTHON} names {python}", "there is no such program", f"correct {PYTHON}")
    address = server_in(directory).address.removeprefix("unix:")
    with disk_faults(directory):
        directory.mkdir(mode=0o700)
    # not `vllm serve`, which the package for CPUs lacks
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    command += [f"--uds={address}", "--disable-uvicorn-access-log", *options]
    kept = Kept(
        command,
        remove=[directory],
        log=directory / _LOG,
        environment={
            **{name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)},
            "VLLM_SERVER_DEV_MODE": "1",  # the calls that take weights
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        },
    )
    return server_in(directory, kept)


def server_in(directory: Path, kept: Kept | None = None) -> VllmServer:
    """The server that this process (`kept`), or another one of this machine, has started in `directory`.

    Raises:
        EnvironmentFault: the path is too long for a socket.
    """
    path = str(directory / _SOCKET)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise EnvironmentFault(
            f"{directory.parent} is no place for a socket",
            "its path is too long",
            "set TMPDIR to a shorter one",
        )
    return VllmServer(f"unix:{path}", directory, kept)


def check_url(url: str) -> str:
    """The url of a server, as it is called. Raises ConfigError when it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(
            f"rollout.url is {url}", "that is no address of a server", "write it as http://127.0.0.1:8000"
        )
    return url


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket of the file system."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: str, timeout_s: float) -> http.client.HTTPConnection:
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"), timeout_s)
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname is not None
    return kind(parts.hostname, parts.port, timeout=timeout_s)


def _cure(log: str) -> str:
    if "No module named 'vllm'" in log or "No module named vllm" in log:
        return f"install vLLM in an environment of its own, and name its interpreter in {PYTHON}"
    if "Free memory on device" in log or "out of memory" in log or "KV cache" in log:
        return (
            "lower rollout.memory_share, spread the model with rollout.tensor_parallel, or use a larger GPU"
        )
    return ""
