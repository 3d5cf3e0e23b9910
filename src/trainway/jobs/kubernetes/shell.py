"""Into a pod: commands, a terminal, ports and files, through the API server; nothing of the pod is open to the world."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from trainway.errors import EnvironmentFault
from trainway.jobs.kubernetes.cluster import Cluster
from trainway.jobs.kubernetes.names import CONTAINER
from trainway.jobs.target import Say

SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash || exec sh")
BLOCK_BYTES = 1 << 18
RESIZE_CHANNEL = 4

Sink = Callable[[bytes], object]


def run(
    cluster: Cluster,
    pod: str,
    command: Sequence[str],
    *,
    out: Sink,
    err: Sink,
    feed: Iterable[bytes] | None = None,
) -> int:
    """Run a command in the pod without a terminal and hand on what it prints; its exit code.

    `feed`: what it reads; there is no end of file to be seen, so it must know how much it reads.
    Raises EnvironmentFault when the connection fails.
    """
    stream = _open(cluster, pod, command, stdin=feed is not None, tty=False)
    with _connection(pod, stream):
        for block in feed or ():
            stream.write_stdin(block)
            stream.update(timeout=0)
            _drain(stream, out, err)
        while stream.is_open():
            stream.update(timeout=1)
            _drain(stream, out, err)
        _drain(stream, out, err)
        return _exit_code(pod, stream)


def output(cluster: Cluster, pod: str, command: Sequence[str]) -> tuple[int, bytes]:
    """Exit code and standard output of a command."""
    found: list[bytes] = []
    code = run(cluster, pod, command, out=found.append, err=lambda _: None)
    return code, b"".join(found)


def terminal(cluster: Cluster, pod: str, command: Sequence[str]) -> int:
    """A shell, or one command, at this terminal; its exit code."""
    if not command and not sys.stdin.isatty():
        raise EnvironmentFault(
            "a shell needs a terminal", "this is none", "give a command, or run it in a terminal"
        )
    if command:
        return run(cluster, pod, command, out=_write(sys.stdout), err=_write(sys.stderr))
    stream = _open(cluster, pod, SHELL, stdin=True, tty=True)
    with _connection(pod, stream), _raw_terminal(stream):
        typing = sys.stdin.fileno()
        while stream.is_open():
            ready, _, _ = select.select([typing, stream.sock.sock], [], [], 1)
            if typing in ready:
                stream.write_stdin(os.read(typing, BLOCK_BYTES))
            stream.update(timeout=0)
            _drain(stream, _write(sys.stdout), _write(sys.stderr))
        return _exit_code(pod, stream)


def tunnel(cluster: Cluster, pod: str, ports: Mapping[int, int], say: Say) -> int:
    """Make {port here: port in the pod} reachable on 127.0.0.1 until interrupted."""
    listeners = [(_listen(here), there) for here, there in ports.items()]
    for listener, there in listeners:
        threading.Thread(target=_accept, args=(cluster, pod, listener, there, say), daemon=True).start()
        say(f"http://127.0.0.1:{listener.getsockname()[1]} is port {there} of {pod}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for listener, _ in listeners:
            listener.close()
    return 0


def _cure(said: str, way: str, cluster: Cluster) -> str:
    if "403" in said or "Forbidden" in said:
        # which of the two is asked for depends on the cluster's version
        return f"ask for the right to get and create pods/{way} in {cluster.namespace} (docs/kubernetes.md)"
    return "log in again" if "401" in said else "see `trainway status`: it has to run"


def _open(cluster: Cluster, pod: str, command: Sequence[str], *, stdin: bool, tty: bool) -> Any:
    from kubernetes import client, stream
    from kubernetes.client.exceptions import ApiException

    # a client of its own: the stream puts its transport in the place of the client's for a moment
    api = client.CoreV1Api(client.ApiClient(cluster.api.configuration))
    try:
        return stream.stream(
            api.connect_get_namespaced_pod_exec,
            pod,
            cluster.namespace,
            container=CONTAINER,
            command=list(command),
            stdin=stdin,
            stdout=True,
            stderr=not tty,
            tty=tty,
            binary=True,
            _preload_content=False,
        )
    except ApiException as error:
        # of the answer its first words alone: behind them are headers
        said = str(error.reason).strip().partition("-+-+-")[0].strip()
        raise EnvironmentFault(f"cannot get into the pod {pod}", said, _cure(said, "exec", cluster)) from None


@contextmanager
def _connection(pod: str, stream: Any) -> Iterator[None]:
    from websocket import WebSocketException

    try:
        yield
    except (WebSocketException, OSError) as error:
        raise EnvironmentFault(
            f"the connection to the pod {pod} broke off", str(error), "the same command begins it again"
        ) from error
    finally:
        with suppress(WebSocketException, OSError):
            stream.close()


def _drain(stream: Any, out: Sink, err: Sink) -> None:
    for channel, sink in ((1, out), (2, err)):
        if block := stream.read_channel(channel):  # waits for nothing
            sink(block)


def _exit_code(pod: str, stream: Any) -> int:
    try:
        return int(stream.returncode)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EnvironmentFault(
            f"the connection to the pod {pod} broke off", "the command's exit code did not come", "try again"
        ) from error


def _write(file: Any) -> Sink:
    def write(block: bytes) -> None:
        file.buffer.write(block)
        file.buffer.flush()

    return write


@contextmanager
def _raw_terminal(stream: Any) -> Iterator[None]:
    """Every key goes to the pod; the pod's terminal is as large as this one."""
    import json
    import termios
    import tty

    def resize(*_: object) -> None:
        size = shutil.get_terminal_size()
        stream.write_channel(
            RESIZE_CHANNEL, json.dumps({"Width": size.columns, "Height": size.lines}).encode()
        )

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    handler = signal.signal(signal.SIGWINCH, resize)
    try:
        tty.setraw(descriptor)
        resize()
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise EnvironmentFault(
            f"the port {port} of this machine is taken", f"{error.strerror}", f"use another: e.g. {port + 1}:{port}"
        ) from error  # fmt: skip


def _accept(cluster: Cluster, pod: str, listener: socket.socket, there: int, say: Say) -> None:
    while True:
        try:
            here, _ = listener.accept()
        except OSError:  # closed
            return
        threading.Thread(target=_forward, args=(cluster, pod, here, there, say), daemon=True).start()


def _forward(cluster: Cluster, pod: str, here: socket.socket, there: int, say: Say) -> None:
    from kubernetes import client, stream
    from kubernetes.client.exceptions import ApiException

    api = client.CoreV1Api(client.ApiClient(cluster.api.configuration))
    try:
        forwarded = stream.portforward(
            api.connect_get_namespaced_pod_portforward, pod, cluster.namespace, ports=str(there)
        )
    except ApiException as error:
        said = str(error.reason).strip().partition("-+-+-")[0].strip()
        say(f"port {there}: {said}; {_cure(said, 'portforward', cluster)}")
        here.close()
        return
    remote = forwarded.socket(there)
    back = threading.Thread(target=_pump, args=(remote, here), daemon=True)
    back.start()
    _pump(here, remote)
    back.join()
    if said := forwarded.error(there):
        say(f"port {there}: {said.strip()}")


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(BLOCK_BYTES):
            sink.sendall(block)
    for end in (source, sink):
        with suppress(OSError):
            end.close()
