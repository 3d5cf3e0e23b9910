"""Commands, files and ports through the API server's own protocols, spoken by a small server that runs real processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.jobs.kubernetes.material import make_job
from trainway.errors import EnvironmentFault
from trainway.jobs.kubernetes import shell, upload
from trainway.jobs.kubernetes.cluster import Cluster
from trainway.jobs.kubernetes.shell import BLOCK_BYTES, output, run, tunnel
from trainway.jobs.target import Job

pytest.importorskip("kubernetes")
web = pytest.importorskip("aiohttp.web")


class Pods:
    """Runs what it is told here, and counts it."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.cut_after: int | None = None
        """Bytes of input after which the connection is cut."""

    async def execute(self, request: Any) -> Any:
        words = request.query.getall("command")
        self.commands.append(words)
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        words = [sys.executable if words[0] == "python" else words[0], *words[1:]]
        process = await asyncio.create_subprocess_exec(
            *words, stdin=-1, stdout=-1, stderr=-1, env={**os.environ, "PYTHONPATH": ""}
        )
        assert process.stdin and process.stdout and process.stderr

        async def tell(channel: int, pipe: asyncio.StreamReader) -> None:
            while block := await pipe.read(1000):
                await socket.send_bytes(bytes([channel]) + block)

        reading = asyncio.ensure_future(self._feed(socket, process))
        await asyncio.gather(tell(1, process.stdout), tell(2, process.stderr))
        code = await process.wait()
        status: dict[str, Any] = {"status": "Success"}
        if code:
            cause = {"reason": "ExitCode", "message": str(code)}
            status = {"status": "Failure", "details": {"causes": [cause]}}
        if not socket.closed:
            await socket.send_bytes(b"\x03" + json.dumps(status).encode())
            await socket.close()
        reading.cancel()
        return socket

    async def _feed(self, socket: Any, process: Any) -> None:
        taken = 0
        async for message in socket:
            taken += len(message.data) - 1
            if self.cut_after is not None and taken > self.cut_after:
                self.cut_after = None
                process.stdin.close()
                socket._req.transport.abort()
                return
            process.stdin.write(message.data[1:])
            await process.stdin.drain()

    async def forward(self, request: Any) -> Any:
        port = int(request.query["ports"]).to_bytes(2, "little")
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        for channel in (b"\0", b"\1"):
            await socket.send_bytes(channel + port)
        async for message in socket:
            await socket.send_bytes(message.data[:1] + message.data[1:].upper())
        return socket


@pytest.fixture
def pods() -> Iterator[tuple[Cluster, Pods]]:
    from kubernetes import client

    held = Pods()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> tuple[Any, int]:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/default/pods/p/exec", held.execute)
        app.router.add_get("/api/v1/namespaces/default/pods/p/portforward", held.forward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=1)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
    settings = client.Configuration(host=f"http://127.0.0.1:{port}")
    yield Cluster(client.ApiClient(settings), "default"), held
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


def test_a_command_gives_its_output_and_exit_code(pods: tuple[Cluster, Pods]) -> None:
    cluster, _ = pods
    said: list[bytes] = []
    program = "import sys; print('out' * 3000); print('err', file=sys.stderr); sys.exit(7)"
    code = run(cluster, "p", ("python", "-c", program), out=said.append, err=said.append)
    assert code == 7
    assert b"".join(said).replace(b"err\n", b"") == b"out" * 3000 + b"\n"
    assert output(cluster, "p", ("cat", "/dev/null")) == (0, b"")


def test_hostile_words_arrive_as_words(pods: tuple[Cluster, Pods], tmp_path: Path) -> None:
    cluster, held = pods
    words = ["$(touch x);'\"", "a\nb", "&command=rm", "--", "ä"]
    code, text = output(cluster, "p", ("python", "-c", "import sys; print(sys.argv[1:])", *words))
    assert (code, text.decode().strip()) == (0, repr(words))
    assert held.commands[0][3:] == words


def test_a_pod_that_is_not_there(pods: tuple[Cluster, Pods]) -> None:
    with pytest.raises(EnvironmentFault, match="cannot get into the pod other"):
        output(pods[0], "other", ("true",))


def job_at(root: Path, folder: Path, files: list[Any]) -> Job:
    """A job whose volume is a directory here."""
    job = make_job(folder, "upload", upload=files)
    return replace(job, orders=job.orders.model_copy(update={"root": str(root)}))


def test_files_arrive_whole_and_once(pods: tuple[Cluster, Pods], tmp_path: Path) -> None:
    cluster, _ = pods
    source, root = tmp_path / "here", tmp_path / "there"
    odd = "odd $(touch x);'\".bin"
    (source / "more").mkdir(parents=True)
    content = {odd: os.urandom(3 * BLOCK_BYTES + 5), "more/empty": b"", "more/b": b"b" * 10}
    for name, data in content.items():
        (source / name).write_bytes(data)
    job = job_at(root, source, [{"path": odd}, {"path": "more", "to": "data/m"}])
    said: list[str] = []
    upload.bring_files(cluster, "p", job, said.append)
    assert (root / odd).read_bytes() == content[odd]
    assert (root / "data/m/empty").read_bytes() == b""
    assert (root / "data/m/b").read_bytes() == content["more/b"]
    assert (root / "jobs/tune-7b/uploaded").is_file()
    assert not (root / "x").exists() and not list(root.rglob("*.tmp-upload"))
    assert len([line for line in said if line.startswith("uploaded:")]) == 3
    said.clear()
    upload.bring_files(cluster, "p", job, said.append)
    assert [line.partition(":")[0] for line in said] == ["there already"] * 3


def test_a_cut_leaves_no_half_file_and_the_next_try_brings_it(
    pods: tuple[Cluster, Pods], tmp_path: Path
) -> None:
    cluster, held = pods
    source, root = tmp_path / "here", tmp_path / "there"
    source.mkdir()
    data = os.urandom(4 * BLOCK_BYTES)
    (source / "big").write_bytes(data)
    job = job_at(root, source, ["big"])
    held.cut_after = 2 * BLOCK_BYTES
    with pytest.raises(EnvironmentFault):
        upload.bring_files(cluster, "p", job, lambda _: None)
    assert not (root / "big").exists()
    assert not (root / "jobs/tune-7b/uploaded").exists()  # the job goes on waiting
    upload.bring_files(cluster, "p", job, lambda _: None)
    assert (root / "big").read_bytes() == data


def test_an_altered_file_is_refused(pods: tuple[Cluster, Pods], tmp_path: Path) -> None:
    target = tmp_path / "file"
    said: list[bytes] = []
    command = ("python", "-c", upload._TAKE, str(target), "4", "0" * 64)
    assert run(pods[0], "p", command, out=said.append, err=said.append, feed=[b"data"]) == 1
    assert b"arrived altered" in b"".join(said) and not target.exists()


def test_a_port_is_reachable_here_alone(pods: tuple[Cluster, Pods]) -> None:
    said: list[str] = []
    ready = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        ready.set()

    threading.Thread(target=tunnel, args=(pods[0], "p", {0: 6006}, say), daemon=True).start()
    assert ready.wait(30)
    host, port = said[0].split()[0].removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    for text in (b"hello", b"again"):  # a connection each
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(text)
            assert connection.recv(100) == text.upper()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"the port {port} of this machine is taken"):
            shell._listen(port)


def test_a_right_to_get_in_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the status stand the answer's headers, whatever is in them."""
    from kubernetes import client, stream
    from kubernetes.client.exceptions import ApiException

    def refused(*_: Any, **__: Any) -> Any:
        raise ApiException(
            status=0, reason="Handshake status 403 Forbidden -+-+- {'x': 'canary'} -+-+- b'no'"
        )

    monkeypatch.setattr(stream, "stream", refused)
    cluster = Cluster(client.ApiClient(client.Configuration(host="http://127.0.0.1:9")), "training")
    with pytest.raises(EnvironmentFault, match="cannot get into the pod w-0") as caught:
        output(cluster, "w-0", ["true"])
    assert caught.value.why == "Handshake status 403 Forbidden"
    assert "get and create pods/exec in training" in caught.value.fix and "canary" not in str(caught.value)
