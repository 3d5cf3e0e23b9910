"""The board's web server: what it answers, to whom, and what it never does."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.board_material import make_run, validation
from trainway.board.server import HEADERS, MOST_CONNECTIONS, BoardServer, known_hosts
from trainway.board.watch import Board
from trainway.errors import EnvironmentFault

CANARY = "hf_CanaryCanaryCanary123"


@pytest.fixture(autouse=True)
def _looks_at_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainway.board.watch.FRESH_S", 0.0)
    monkeypatch.setattr("trainway.board.watch.SEARCH_S", 0.0)
    monkeypatch.setattr("trainway.board.watch.SEARCH_SHARE", 0)
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(CANARY)
    make_run(
        tmp_path / "root" / "one",
        steps=30,
        samples=[{"step": s, "prompt": f"tell {CANARY}", "text": "<script>x</script>"} for s in (10, 20)],
        log=f"2026-11-22T00:00:00Z ERROR error: login {CANARY} refused\nhub_token=abcdefgh1 https://me:pw@host\n",
        error=f"login {CANARY}",
        description=CANARY,
    )
    return tmp_path / "root"


@pytest.fixture
def server(root: Path) -> Iterator[BoardServer]:
    with BoardServer(Board(root), "127.0.0.1", 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def get(
    server: BoardServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def ask(server: BoardServer, path: str) -> dict[str, Any]:
    status, _, body = get(server, path)
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def raw(server: BoardServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        answer = b""
        with suppress(OSError):  # it may have been turned away already
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while block := connection.recv(1 << 16):
                answer += block
        return answer


def the_run(server: BoardServer) -> str:
    key: str = ask(server, "/api/runs")["runs"][0]["id"]
    return f"/api/runs/{key}"


def test_every_answer_has_the_headers_that_keep_a_page_to_itself(server: BoardServer) -> None:
    run = the_run(server)
    for path in ("/", "/static/board.js", "/api/runs", run, f"{run}/series", f"{run}/log", "/nothing"):
        _, headers, _ = get(server, path)
        assert {name: headers[name.lower()] for name in HEADERS} == HEADERS
        assert "trainway" in headers["server"] and "Python" not in headers["server"]
        assert "access-control-allow-origin" not in headers
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/board.js", "text/javascript; charset=utf-8"),
        ("/static/charts.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/svg+xml"),
        ("/api/runs", "application/json"),
    ],
)
def test_files_have_their_types_and_head_has_no_body(server: BoardServer, path: str, kind: str) -> None:
    status, headers, body = get(server, path)
    assert status == 200 and headers["content-type"] == kind and len(body) == int(headers["content-length"])
    status, head, none = get(server, path, "HEAD")
    assert (status, none, head["content-length"]) == (200, b"", headers["content-length"])
    assert get(server, path, If_None_Match=headers["etag"])[0] == 304


def test_the_page_has_no_script_or_style_of_its_own_and_loads_from_here_alone() -> None:
    from importlib import resources

    page = resources.files("trainway.board").joinpath("static", "index.html").read_text()
    assert "<style" not in page and " style=" not in page and "onload" not in page and "://" not in page
    assert page.count("<script") == page.count('<script defer src="/') + page.count(
        '<script type="module" src="/'
    )


def test_our_scripts_make_text_of_text() -> None:
    from importlib import resources

    for entry in resources.files("trainway.board").joinpath("static").iterdir():
        if entry.name.endswith(".js"):
            text = entry.read_text()
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "http://",
                "https://",
            ):
                assert word not in text, (entry.name, word)


def test_big_answers_are_squeezed_for_those_who_take_it(server: BoardServer) -> None:
    status, headers, body = get(server, "/static/charts.js", Accept_Encoding="gzip, br")
    assert status == 200 and headers["content-encoding"] == "gzip"
    assert gzip.decompress(body) == get(server, "/static/charts.js")[2]
    assert "content-encoding" not in get(server, "/static/charts.js")[1]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "BREW"])
def test_nothing_is_changed_by_any_method(server: BoardServer, method: str) -> None:
    status, headers, _ = get(server, "/api/runs", method)
    assert (status, headers["allow"], headers["connection"]) == (405, "GET, HEAD", "close")
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/static/../../secret.txt",
        "/static/%2e%2e/%2e%2e/secret.txt",
        "/static//etc/passwd",
        "/static/board.js/../../../secret.txt",
        "/api/runs/../../secret.txt",
        "/api/runs/one",
        "/api/runs/one/log",
        "/api/runs/%2e%2e/log",
        "/api/runs/0000000000000000",
        "/api/runs/0000000000000000/series",
        "/api/runs/0000000000000000/../secret.txt",
        "/api/runs/" + "0" * 60_000,
        "/static/",
        "/static/uPlot.LICENSE%00.js",
        "//etc/passwd",
        "/one/metrics.jsonl",
    ],
)  # fmt: skip
def test_no_path_leads_to_the_disk(server: BoardServer, path: str) -> None:
    status, _, body = get(server, path)
    assert status in (400, 404)
    assert CANARY.encode() not in body and b"root:" not in body


@pytest.mark.parametrize(
    "request_line", ["GET http://evil.example/api/runs HTTP/1.1", "GET * HTTP/1.1", "GET api HTTP/1.1"]
)
def test_other_forms_of_a_request_find_nothing(server: BoardServer, request_line: str) -> None:
    answer = raw(server, f"{request_line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"400", b"404") and b"one" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", b"<script>alert(1)</script> / HTTP/1.1\r\n\r\n", b""],
)  # fmt: skip
def test_garbage_ends_its_own_connection_alone(server: BoardServer, garbage: bytes) -> None:
    answer = raw(server, garbage)
    assert b" 200 " not in answer[:20] and b"<script>" not in answer
    assert get(server, "/")[0] == 200


def test_a_body_is_no_second_request(server: BoardServer) -> None:
    smuggled = b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(smuggled)
    assert raw(server, head + smuggled).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7007", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1", "user@127.0.0.1", "10.0.0.1", "127.0.0.1:x"])  # fmt: skip
def test_another_name_is_not_answered(server: BoardServer, host: str) -> None:
    answer = raw(server, f"GET /api/runs HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] == b"421" and b"token" not in answer


def test_one_host_and_no_more(server: BoardServer) -> None:
    for hosts in ("", "Host: localhost\r\nHost: localhost\r\n"):
        assert (
            raw(server, f"GET / HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode()).split()[1] == b"421"
        )


def test_names_that_are_answered() -> None:
    local, open_to_all, named = known_hosts("127.0.0.1"), known_hosts("0.0.0.0"), known_hosts("gpu1.example")
    for header in ("127.0.0.1", "127.0.0.1:9000", "localhost:7007", "LOCALHOST", "[::1]:7007"):
        assert local(header) and open_to_all(header) and named(header)
    assert not local("10.0.0.1") and open_to_all("10.0.0.1:7007") and open_to_all("[fe80::1]")
    assert open_to_all(socket.gethostname()) and named("gpu1.example:7007")
    assert (
        not open_to_all("evil.example")
        and not named("evil.example")
        and not local(socket.gethostname() + ".x")
    )


def test_other_pages_may_link_here_and_read_nothing(server: BoardServer) -> None:
    assert get(server, "/api/runs", Sec_Fetch_Site="cross-site")[0] == 403
    assert get(server, "/static/board.js", Sec_Fetch_Site="same-site")[0] == 403
    assert get(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert get(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert get(server, "/api/runs", Sec_Fetch_Site="same-origin")[0] == 200


def test_unchanged_is_said_without_a_body(server: BoardServer, root: Path) -> None:
    run = the_run(server)
    for path in ("/api/runs", run, f"{run}/series", f"{run}/log"):
        token = ask(server, path)["token"]
        status, headers, body = get(server, f"{path}?since={token}", If_None_Match=f'"{token}"')
        assert (status, body, headers["etag"]) == (304, b"", f'"{token}"'), path
    with (root / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(validation(31)) + "\n")
    with (root / "one" / "log.txt").open("a") as file:
        file.write("2026-11-22T00:00:00Z WARNING warning: late\n")
    for path in ("/api/runs", run, f"{run}/series", f"{run}/log"):
        assert get(server, f"{path}?since=x", If_None_Match='"x"')[0] == 200


def test_a_run_is_told_with_its_secrets_masked(server: BoardServer, root: Path) -> None:
    (root / "one" / "checkpoints" / "step-20").mkdir(parents=True)
    (root / "one" / "checkpoints" / "step-20" / "model.bin").write_bytes(b"x" * 1000)
    (root / "one" / "checkpoints" / "latest").symlink_to("step-20")
    run = the_run(server)
    found = ask(server, run)
    assert [sample["step"] for sample in found["samples"]] == [20, 10]
    assert found["samples"][0]["prompt"] == "tell ***" and found["samples"][0]["text"] == "<script>x</script>"
    assert found["settings"]["train.total_steps"] == "5000" and found["description"] == "***"
    assert found["warnings"][-1]["text"] == "error: login *** refused"
    assert found["checkpoints"] == [
        {"step": 20, "bytes": 1000, "latest": True, "best": False, "intact": False}
    ]
    assert found["origin"]["torch"] == "2.13.0" and found["origin"]["machine"] == "node-1"
    lines = ask(server, f"{run}/log")["lines"]
    assert lines[-2:] == [
        "2026-11-22T00:00:00Z ERROR error: login *** refused",
        "hub_token=*** https://***@host",
    ]
    for path in ("/api/runs", run, f"{run}/series", f"{run}/log"):
        assert CANARY not in json.dumps(ask(server, path))


def test_checkpoints_behind_a_link_are_not_looked_at(server: BoardServer, root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "step-7").mkdir(parents=True)
    (root / "one" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert ask(server, the_run(server))["checkpoints"] == []


def test_the_log_follows_whole_lines_and_begins_anew(server: BoardServer, root: Path) -> None:
    path, log = f"{the_run(server)}/log", root / "one" / "log.txt"
    found = ask(server, path)
    assert found["anew"] and found["lines"][0].endswith("dense bf16)")
    with log.open("a") as file:
        file.write("next\nhalf")
    found = ask(server, f"{path}?since={found['token']}")
    assert (found["lines"], found["anew"]) == (["next"], False)
    with log.open("a") as file:
        file.write(" done\n")
    found = ask(server, f"{path}?since={found['token']}")
    assert found["lines"] == ["half done"]
    log.write_text("short\n")
    assert ask(server, f"{path}?since={found['token']}") | {"token": ""} == {
        "token": "", "lines": ["short"], "anew": True,
    }  # fmt: skip
    log.unlink()
    assert ask(server, path)["lines"] == []


def test_a_big_log_is_read_from_its_end(server: BoardServer, root: Path) -> None:
    with (root / "one" / "log.txt").open("a") as file:
        file.writelines(f"line {i:07d} {'x' * 80}\n" for i in range(30_000))
    found = ask(server, f"{the_run(server)}/log")
    assert 600 < len(found["lines"]) < 800 and found["lines"][-1].startswith("line 0029999")


@pytest.mark.parametrize(
    "since", ["../../etc", "%00", "x" * 1000, "1.1.1.1", "none.0", "ff.999999999999999999"]
)
def test_tokens_that_are_none_begin_anew(server: BoardServer, since: str) -> None:
    run = the_run(server)
    for path in ("/api/runs", f"{run}/series"):
        assert ask(server, f"{path}?since={since}")["whole"]
    assert ask(server, f"{run}/log?since={since}")["anew"]


def test_a_fault_of_ours_ends_one_answer(server: BoardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(CANARY)

    with monkeypatch.context() as patch:
        patch.setattr(server.routes._board, "runs", fail)
        status, headers, body = get(server, "/api/runs")
        assert status == 500 and CANARY.encode() not in body and "content-security-policy" in headers
    assert get(server, "/api/runs")[0] == 200


def test_too_many_connections_are_turned_away_and_the_others_live(server: BoardServer) -> None:
    held = [
        socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
        for _ in range(MOST_CONNECTIONS)
    ]
    for connection in held:
        connection.sendall(b"GET /favicon.ico HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 503")
    for connection in held:
        connection.close()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        ):
            break
    else:
        pytest.fail("the connections were not given back")


def test_nothing_is_read_while_nobody_looks(server: BoardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    the_run(server)
    opened: list[object] = []
    before = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a) or before(*a, **k))
    monkeypatch.setattr(os, "scandir", lambda *a: pytest.fail("searched"))
    time.sleep(0.3)
    assert opened == []


def test_a_port_in_use_is_named_and_another_proposed(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault) as caught:
            BoardServer(Board(root), "127.0.0.1", port)
    assert caught.value.what == f"port {port} is in use on 127.0.0.1"
    proposed = int(caught.value.fix.rpartition(" ")[2])
    assert proposed != port
    with BoardServer(Board(root), "127.0.0.1", proposed) as server:
        assert server.url == f"http://127.0.0.1:{proposed}/"


def test_an_address_of_another_machine_is_an_error(root: Path) -> None:
    for host in ("203.0.113.9", "no such name", "\u2603"):
        with pytest.raises(EnvironmentFault) as caught:
            BoardServer(Board(root), host, 0)
        assert caught.value.what == f"{host} is no address of this machine"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_program_starts_warns_and_ends_when_told(root: Path, ending: signal.Signals) -> None:
    words = ["--host", "0.0.0.0"] if ending == signal.SIGTERM else []
    process = subprocess.Popen(
        [sys.executable, "-m", "trainway", "board", str(root), "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    url = line.split()[0]
    assert line == f"{url} shows the runs in {root}; Ctrl-C ends it\n"
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=20)
    connection.request("GET", "/api/runs")
    assert json.loads(connection.getresponse().read())["runs"][0]["name"] == "one"
    process.send_signal(ending)  # with a connection open
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert ("whoever reaches 0.0.0.0 sees" in stderr) == bool(words)
    assert stderr.count("\n") == len(words) // 2
