"""How a machine is asked to end: in which words, how often, and never with the key in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pod_material import KEY, runpod
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
