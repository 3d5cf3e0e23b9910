"""A log comes whole and once, wherever its connection is cut."""

from __future__ import annotations

import pytest

from tests.fakes_runpod import FakeRunPod
from tests.unit.jobs.runpod.test_api import BODY
from trainway.jobs.runpod.api import Api, Lost, Refused
from trainway.jobs.runpod.logs import ATTEMPTS, pod_lines

MOMENTS = [f"2027-01-15T08:00:{number:02d}Z/{number:012d}" for number in range(20)]


def running(api: Api, fake: FakeRunPod, lines: list[tuple[str, str]]) -> str:
    fake.lives.append(["RUNNING"])
    pod = api.create_pod(BODY)
    fake.logs[pod.id] = lines
    return pod.id


def read(api: Api, pod_id: str, *, follow: bool = False, tail: int | None = None) -> list[str]:
    pod = api.find_pod(pod_id)
    assert pod is not None
    return list(pod_lines(api, pod, follow=follow, tail=tail))


@pytest.mark.parametrize("repeats", [False, True])
def test_cut_after_every_line(api: Api, fake: FakeRunPod, repeats: bool) -> None:
    lines = [f"line {number}" for number in range(20)]
    pod_id = running(api, fake, list(zip(MOMENTS, lines, strict=True)))
    fake.repeats_moment = repeats
    fake.log_cuts = [0, 1, 2, 3, 4, 3, 5, 9]
    assert read(api, pod_id) == lines
    assert [last for _, last in fake.log_requests][:4] == [None, None, None, MOMENTS[0]]
    assert fake.log_requests[0][0] == {"source": "container", "since": "2027-01-15T08:00:00Z"}
    assert fake.log_requests[3][0] == {"source": "container"}


@pytest.mark.parametrize("repeats", [False, True])
def test_many_lines_of_one_moment(api: Api, fake: FakeRunPod, repeats: bool) -> None:
    """The documents say that an id is a time: then lines share one, the same line twice among them."""
    moments = ["2027-01-15T08:00:00Z"] * 2 + ["2027-01-15T08:00:01Z"] * 6 + ["2027-01-15T08:00:02Z"] * 2
    lines = ["a", "b", "same", "same", "c", "same", "d", "e", "same", "f"]
    for cut in range(3, 10):
        pod_id = running(api, fake, list(zip(moments, lines, strict=True)))
        fake.repeats_moment = repeats
        fake.log_cuts = [cut]
        assert read(api, pod_id) == lines, cut


def test_what_a_terminal_must_not_get(api: Api, fake: FakeRunPod) -> None:
    text = "a\x1b[2Jb\u2028c\x85d\tand \x07more"
    pod_id = running(api, fake, [(MOMENTS[0], text), (MOMENTS[1], "10%\r50%\r90%"), (MOMENTS[2], "")])
    assert read(api, pod_id) == ["a[2Jb\u2028cd\tand more", "90%", ""]


def test_the_last_lines_only(api: Api, fake: FakeRunPod) -> None:
    pod_id = running(api, fake, [(moment, moment[-2:]) for moment in MOMENTS])
    assert read(api, pod_id, tail=3) == ["17", "18", "19"]
    assert fake.log_requests[-1] == ({"source": "container", "tail": "3"}, None)
    assert len(read(api, pod_id, tail=6000)) == 20
    assert "since" in fake.log_requests[-1][0]


def test_following_ends_with_the_pod(api: Api, fake: FakeRunPod, monkeypatch: pytest.MonkeyPatch) -> None:
    pod_id = running(api, fake, [(MOMENTS[0], "first")])
    find, looks = api.find_pod, 0

    def look(asked: str) -> object:
        nonlocal looks
        looks += 1
        fake.logs[pod_id].append((MOMENTS[looks], f"look {looks}"))
        if looks == 3:
            fake._set(fake.pods[pod_id], "EXITED")
        return find(asked)

    pod = api.find_pod(pod_id)
    assert pod is not None
    monkeypatch.setattr(api, "find_pod", look)
    assert list(pod_lines(api, pod, follow=True, tail=None)) == ["first", "look 1", "look 2", "look 3"]


def test_a_log_that_cannot_be_had(api: Api, fake: FakeRunPod) -> None:
    pod_id = running(api, fake, [])
    for _ in range(ATTEMPTS):
        fake.fail("GET", f"/pods/{pod_id}/logs", 503, "log store down")
    with pytest.raises(Lost, match="log") as caught:
        read(api, pod_id)
    assert "log store down" in caught.value.why and len(fake.log_requests) == ATTEMPTS
    fake.fail("GET", f"/pods/{pod_id}/logs", 403, "not yours")
    with pytest.raises(Refused, match="log"):
        read(api, pod_id)


def test_cut_within_the_first_moment(api: Api, fake: FakeRunPod) -> None:
    """No moment is before it, and a server that goes on after the one that it is told would pass over the rest."""
    moment = "2027-01-15T08:00:00Z"
    for cut in range(1, 4):
        pod_id = running(api, fake, [(moment, "a"), (moment, "b"), (moment, "b"), (moment, "c")])
        fake.log_cuts = [cut]
        assert read(api, pod_id) == ["a", "b", "b", "c"], cut


def test_a_log_that_is_not_there_yet_is_waited_for(api: Api, fake: FakeRunPod) -> None:
    pod_id = running(api, fake, [(MOMENTS[0], "first")])
    fake.fail("GET", f"/pods/{pod_id}/logs", 404, "no log yet")
    assert read(api, pod_id) == ["first"]
    fake._set(fake.pods[pod_id], "TERMINATED")
    pod = api.create_pod(BODY)
    fake._set(fake.pods[pod.id], "TERMINATED")
    assert list(pod_lines(api, pod, follow=True, tail=None)) == []


def test_silence_before_the_answer_is_no_empty_log(
    api: Api, fake: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    pod_id = running(api, fake, [(MOMENTS[0], "first")])
    stream, waits = api._client.stream, []

    def slow(*arguments: object, timeout: httpx.Timeout, **more: object) -> object:
        waits.append(timeout.read)
        if len(waits) < 3:
            raise httpx.ReadTimeout("no answer")
        return stream(*arguments, timeout=timeout, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(api._client, "stream", slow)
    assert read(api, pod_id) == ["first"] and waits == [3.0, 6.0, 9.0]
