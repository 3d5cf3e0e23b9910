"""How a machine is asked to end: in which words, how often, and never with the key in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.pod_material import KEY, runpod
from tests.servers import tcp_server
from trainway.pod.ending import Answer, ask_runpod, keep_asking, run_end_command


def asked(answers: list[Answer], most: int = 99) -> tuple[bool, list[float], list[str]]:
    waits: list[float] = []
    said: list[str] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) >= most

    ended = keep_asking(lambda: answers.pop(0), said.append, wait, 10.0)
    return ended, waits, said


def test_the_pauses_double_up_to_five_minutes_and_the_server_may_ask_for_longer_ones() -> None:
    answers = [Answer(False, "busy")] * 7 + [Answer(False, "busy", wait_s=250.0)] + [Answer(True, "gone")]
    ended, waits, said = asked(answers)
    assert ended
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300]
    assert said[0] == "the machine is NOT ended and goes on costing (attempt 1): busy; again in 10 s"
    assert said[-1] == "gone"
    assert asked([Answer(False, "busy", wait_s=45.0), Answer(True, "gone")])[1] == [45.0]


def test_asking_ends_when_the_process_itself_is_to_end() -> None:
    assert asked([Answer(False, "busy")] * 3, most=2)[:2] == (False, [10, 20])


def environ(address: str, **more: str) -> dict[str, str]:
    return {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "p1", "RUNPOD_API_KEY": KEY, **more}


@pytest.mark.parametrize(
    ("code", "ended"),
    [(200, True), (204, True), (404, True), (401, False), (429, False), (500, False), (302, False)],
)
def test_what_an_answer_means(code: int, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with runpod(lambda number, method, path: code) as (address, requests):
        answer = ask_runpod("stop", environ(address))
    assert answer.ended is ended
    assert requests == [("POST", "/v2/pods/p1/action", '{"action": "stop"}')]
    assert KEY not in answer.what


def test_a_stop_that_is_refused_never_becomes_a_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with runpod(lambda number, method, path: 409) as (address, requests):
        assert not ask_runpod("stop", environ(address)).ended
        assert [method for method, _, _ in requests] == ["POST"]
        answer = ask_runpod("terminate", environ(address))
    assert [method for method, _, _ in requests[1:]] == ["POST", "DELETE"]
    assert answer.what == (
        "refused: POST /v2/pods/p1/action 409 busy; then refused: DELETE /v2/pods/p1 409 busy"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RUNPOD_API_KEY": ""}, "RUNPOD_API_KEY not set"),
        ({"RUNPOD_POD_ID": ""}, "RUNPOD_POD_ID not set"),
        ({"TRAINWAY_RUNPOD_API": "http://example.com"}, "neither https nor on this machine"),
        ({"RUNPOD_API_KEY": f"{KEY}\nX: y"}, "holds a character that no header may have"),
        ({"TRAINWAY_RUNPOD_API": "http://127.0.0.1:1/v2"}, "failed: POST /v2/pods/p1/action"),
    ],
)
def test_what_cannot_be_asked_is_said_without_the_key(
    change: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    answer = ask_runpod("terminate", {**environ("http://127.0.0.1:1"), **change})
    assert not answer.ended
    assert said in answer.what
    assert KEY not in answer.what


def test_a_command_ends_the_machine_or_says_why_not(tmp_path: Path) -> None:
    run: Callable[..., Answer] = lambda *words: run_end_command(words, {"PATH": "/usr/bin:/bin"})  # noqa: E731
    assert run("true") == Answer(True, "true has ended the machine")
    assert run("sh", "-c", "echo so >&2; exit 3").what == "sh ended with exit code 3: so"
    assert not run(str(tmp_path / "nothing")).ended


DEEP = b"[" * 60_000
GARBAGE = {
    "cut within the body": b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n{",
    "nested without end": b"HTTP/1.1 409 No\r\nContent-Length: %d\r\n\r\n" % len(DEEP) + DEEP,
    "a broken chunk": b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no HTTP": b"\x00\xff\x16\x03 <html>$(touch x);'\r\n\r\n",
    "nothing": b"",
    "a wait of for ever": b"HTTP/1.1 429 No\r\nRetry-After: " + b"9" * 400 + b"\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("action", ["stop", "terminate"])
def test_an_answer_that_is_garbage_is_a_failure_and_asked_again(
    raw: bytes, action: Literal["stop", "terminate"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with tcp_server(lambda request: raw) as port:
        answer = ask_runpod(action, environ(f"http://127.0.0.1:{port}"))
        assert not answer.ended and KEY not in answer.what
        assert answer.wait_s is None or answer.wait_s <= 300


def test_whatever_an_attempt_raises_the_machine_is_asked_again() -> None:
    tries = 0

    def attempt() -> Answer:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RecursionError
        return Answer(True, "gone")

    said: list[str] = []
    assert keep_asking(attempt, said.append, lambda seconds: False, 10.0)
    assert said[0].endswith("(attempt 1): failed: RecursionError; again in 10 s")


def test_a_terminate_that_finds_no_machine_is_followed_by_a_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is there, or nobody would ask: a 404 is a name or a path that the server does not know any more."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with runpod(lambda number, method, path: 404 if method == "POST" else 204) as (address, requests):
        assert ask_runpod("terminate", environ(address)).what == "RunPod has agreed: DELETE /v2/pods/p1 204"
        assert [method for method, _, _ in requests] == ["POST", "DELETE"]
