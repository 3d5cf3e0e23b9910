"""What is asked again and what is not, how long is waited, and that no answer of another form is believed."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest

from tests.fakes_runpod import KEY, FakeRunPod
from tests.unit.jobs.runpod.conftest import A100, H100, Time
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.runpod import models
from trainway.jobs.runpod.api import ATTEMPTS, Api, Lost, Refused, _part

BODY = models.CreatePod(
    name="trainway-x-00000000", image="runpod/pytorch:1", args="", disk=50, env={}, ports=("22/tcp",), start_ssh=True,
    gpu=models.GpuRequest(id=H100, count=1), cloud="SECURE",
)  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code"), [(400, 4), (401, 4), (402, 4), (403, 4), (404, 4), (409, 4), (422, 2)]
)
def test_a_refusal_is_not_asked_again(
    api: Api, fake: FakeRunPod, time_: Time, status: int, code: int
) -> None:
    fake.fail("POST", "/pods", status, f"because of {KEY}", errors=["$.disk: too small"])
    with pytest.raises(Refused) as caught:
        api.create_pod(BODY)
    assert caught.value.status == status and caught.value.code == code
    # in the answer's own words, without the key that it repeats
    assert caught.value.why == f"{status}: because of ***; $.disk: too small"
    assert KEY not in str(caught.value)
    assert len(fake.asked("POST", "/pods")) == 1 and time_.slept == [] and fake.alive() == []


def test_too_many_requests_wait_as_long_as_told(api: Api, fake: FakeRunPod, time_: Time) -> None:
    then = format_datetime(datetime.fromtimestamp(time_.now + 7 + 33, UTC), usegmt=True)
    fake.fail("POST", "/pods", 429, headers={"Retry-After": "7"})
    fake.fail("POST", "/pods", 429, headers={"Retry-After": then})
    fake.fail("POST", "/pods", 429, headers={"Retry-After": "soon"})
    pod = api.create_pod(BODY)
    assert pod.name == BODY.name and len(fake.alive()) == 1
    assert time_.slept == [7.0, 33.0, 4.0]  # without a time that can be read: the third wait of our own


def test_a_date_that_is_past_is_no_wait(api: Api, fake: FakeRunPod, time_: Time) -> None:
    fake.fail("GET", "/pods", 429, headers={"Retry-After": "Thu, 01 Jan 2015 00:00:00 GMT"})
    assert api.list_pods() == [] and time_.slept == [0.0]


def test_a_wait_that_is_too_long_ends_it(api: Api, fake: FakeRunPod, time_: Time) -> None:
    fake.fail("GET", "/pods", 429, headers={"Retry-After": "3600"})
    with pytest.raises(Refused) as caught:
        api.list_pods()
    assert "Retry-After: 3600" in caught.value.why and time_.slept == []


def test_faults_of_the_other_end_are_asked_again_within_bounds(
    api: Api, fake: FakeRunPod, time_: Time
) -> None:
    for status in (500, 502, None, 503):
        fake.fail("GET", "/pods", status)
    assert api.list_pods() == []
    assert time_.slept == [1.0, 2.0, 4.0, 8.0]
    for _ in range(ATTEMPTS):
        fake.fail("GET", "/pods", 503, "down for repair")
    with pytest.raises(Lost) as caught:
        api.list_pods()
    assert "down for repair" in caught.value.why
    assert len(fake.asked("GET", "/pods")) == 2 * ATTEMPTS


def test_waits_have_chance_in_them(time_: Time) -> None:
    from trainway.jobs.runpod.clock import Clock

    assert [Clock(chance=lambda: 0.0).backoff(n) for n in (1, 2, 3, 9)] == [0.5, 1.0, 2.0, 15.0]
    assert [Clock(chance=lambda: 1.0).backoff(n) for n in (1, 2, 3, 9)] == [1.0, 2.0, 4.0, 30.0]


@pytest.mark.parametrize("status", [None, 500])
@pytest.mark.parametrize("after", [False, True])
def test_what_may_have_been_made_is_not_made_again(
    api: Api, fake: FakeRunPod, time_: Time, status: int | None, after: bool
) -> None:
    fake.fail("POST", "/pods", status, after=after)
    with pytest.raises(Lost):
        api.create_pod(BODY)
    assert len(fake.asked("POST", "/pods")) == 1 and time_.slept == []
    assert len(fake.alive()) == after


def test_nothing_was_sent_where_no_connection_came_about(time_: Time) -> None:
    # a port of this machine on which nobody listens
    with Api("http://127.0.0.1:1/v2", KEY, clock=time_.clock) as api, pytest.raises(Lost) as caught:
        api.create_pod(BODY)
    assert time_.slept == [1.0, 2.0, 4.0, 8.0] and "ConnectError" in caught.value.why
    assert KEY not in str(caught.value)


def test_an_answer_of_another_form_is_not_believed(
    api: Api, fake: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "_checked", lambda method, path, answer: (200, {"pods": [{"id": 7}]}, {}))
    with pytest.raises(Lost, match="another form") as caught:
        api.list_pods()
    assert "pods.0.id" in caught.value.why


def test_without_a_key_nothing_is_asked(fake: FakeRunPod) -> None:
    for key in ("", "  ", "two\nlines", "zo\u00eb"):
        with pytest.raises(EnvironmentFault, match="RUNPOD_API_KEY") as caught:
            Api(fake.url, environ={"RUNPOD_API_KEY": key})
        assert key.strip() == "" or key not in str(caught.value)
    assert fake.requests == []


@pytest.mark.parametrize("base", ["http://api.runpod.io/v2", "ftp://127.0.0.1", "api.runpod.io", "https://"])
def test_the_key_goes_nowhere_in_the_clear(base: str) -> None:
    with pytest.raises(ConfigError, match="TRAINWAY_RUNPOD_API"):
        Api(environ={"RUNPOD_API_KEY": KEY, "TRAINWAY_RUNPOD_API": base})


def test_a_name_is_one_part_of_an_address(api: Api, fake: FakeRunPod) -> None:
    assert api.find_pod("x?podId=1#2") is None
    assert fake.requests[-1][:2] == ("GET", "/pods/x?podId=1#2")
    assert _part("../clusters") == "..%2Fclusters"


def test_catalogue_keys_volumes(api: Api, fake: FakeRunPod) -> None:
    fake.gpus[A100][1]["EU-RO-1"] = "NONE"
    h100, a100 = api.gpu_types(count=2, cloud="SECURE")
    assert (h100.id, h100.price.secure, h100.availability) == (H100, 3.99, "HIGH")
    assert {center.id: center.availability for center in h100.data_centers} == {
        "EU-RO-1": "LOW",
        "US-KS-2": "HIGH",
    }
    assert a100.availability == "NONE" and a100.data_centers == []
    volume = api.create_volume(models.CreateVolume(name="v", size=10, data_center="EU-RO-1"))
    assert api.find_volume(volume.id) == volume and api.list_volumes() == [volume]
    api.delete_volume(volume.id)
    assert api.find_volume(volume.id) is None


def test_no_part_of_the_key_is_in_what_is_cut_off(
    api: Api, fake: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is no JSON repeats the request, and its text is cut in the middle of the key."""
    import httpx

    for before in range(170, 201):
        answer = httpx.Response(403, text="x" * before + KEY + "y")
        monkeypatch.setattr(api._client, "request", lambda *_, answer=answer, **__: answer)
        with pytest.raises(Refused) as caught:
            api.list_pods()
        assert KEY[:8] not in str(caught.value), before
    answer = httpx.Response(429, text="slow", headers={"Retry-After": f"99999 {KEY}"})
    monkeypatch.setattr(api._client, "request", lambda *_, **__: answer)
    with pytest.raises(Refused) as caught:
        api.list_pods()
    assert KEY[:8] not in str(caught.value)
