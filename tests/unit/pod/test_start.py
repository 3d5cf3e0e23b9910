"""What a start takes over from the one before, and how orders and secrets are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pod_material import orders_for
from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.orders import JobDir, PodState
from trainway.pod.start import identity, load_state, make_place, node_rank, read_orders, resumed, take_secrets


def state(**more: object) -> PodState:
    values = {"job": "try", "stage": "train", "began": 100.0, "updated": 400.0, "orders": "a"}
    return PodState.model_validate({**values, **more})


FRESH = state(stage="upload", began=1000.0, updated=1000.0)


def test_a_job_that_died_goes_on_with_its_clock_and_its_crashes() -> None:
    found = resumed(state(attempts=2, crashes=1, saved_step=10), FRESH, stop_asked=False)
    assert (found.began, found.attempts, found.crashes, found.saved_step) == (100.0, 2, 2, 10)
    assert resumed(state(stage="prepare"), FRESH, stop_asked=False).crashes == 0


@pytest.mark.parametrize("outcome", ["failed", "stalled", "deadline", "budget"])
def test_a_job_that_is_over_stays_over_until_new_orders_come(outcome: str) -> None:
    before = state(stage="ended", outcome=outcome, exit_code=4, attempts=4, crashes=4)
    assert resumed(before, FRESH, stop_asked=False) == before
    found = resumed(before, FRESH.model_copy(update={"orders": "b"}), stop_asked=False)
    # 300 seconds were used up; the 600 in between do not count
    assert (found.outcome, found.exit_code, found.crashes, found.began) == (None, None, 0, 700.0)


def test_a_job_that_is_done_never_starts_again() -> None:
    before = state(stage="ended", outcome="done")
    assert resumed(before, FRESH.model_copy(update={"orders": "b"}), stop_asked=False) == before


def test_a_stopped_job_goes_on_unless_the_user_asked_for_the_stop() -> None:
    before = state(stage="ended", outcome="stopped")
    assert resumed(before, FRESH, stop_asked=True) == before
    found = resumed(before, FRESH, stop_asked=False)
    assert (found.outcome, found.began) == (None, 100.0)


def test_a_request_to_stop_that_was_answered_does_not_stop_new_orders(tmp_path: Path) -> None:
    orders = orders_for(tmp_path)
    job_dir = make_place(orders, 0, {})
    job_dir.stop_request.touch()
    os.utime(job_dir.stop_request, (350.0, 350.0))
    before = state(stage="ended", outcome="stopped", orders=identity(orders))
    job_dir.state.write_text(before.model_dump_json())
    assert load_state(job_dir, job_dir.stop_request, orders, 1000.0) == (before, 0.0)
    again = orders.model_copy(update={"token": "new"})
    found, answered = load_state(job_dir, job_dir.stop_request, again, 1000.0)
    assert (found.outcome, answered) == (None, 400.0)


def test_a_damaged_state_is_put_aside(tmp_path: Path) -> None:
    job_dir = make_place(orders_for(tmp_path), 0, {})
    job_dir.state.write_text('{"job": "try"')
    found, _ = load_state(job_dir, job_dir.stop_request, orders_for(tmp_path), 50.0)
    assert (found.began, found.outcome) == (50.0, None)
    assert job_dir.state.with_name("state.json.damaged").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 300, b'{"job": "try"', b'{"job": "try", "began": NaN}', b"[" * 9999]
)
def test_limits_hold_over_a_damaged_state(tmp_path: Path, content: bytes) -> None:
    job_dir = make_place(orders_for(tmp_path), 0, {})
    job_dir.state.write_bytes(content)
    job_dir.log.write_text(
        "what sshd said\n[JOB] 1970-01-01T00:01:40Z try: node 0\n[JOB] 1970-01-01T00:20:00Z x\n"
    )
    found, _ = load_state(job_dir, job_dir.stop_request, orders_for(tmp_path), 5000.0)
    assert (found.began, found.outcome) == (100.0, None)
    job_dir.state.write_bytes(content)
    job_dir.log.write_text("[JOB] 9999-99-99T00:01:40Z no time\n")
    assert load_state(job_dir, job_dir.stop_request, orders_for(tmp_path), 5000.0)[0].began == 5000.0


@pytest.mark.parametrize("now", [1000.0, 350.0, 120.0, -1e9])
def test_a_clock_that_is_set_back_gives_no_time_back(now: float) -> None:
    fresh = FRESH.model_copy(update={"began": now, "updated": now})
    found = resumed(state(), fresh, stop_asked=False)
    assert now - found.began >= 300.0  # what had been used up
    assert found.began == min(100.0, now - 300.0)


def test_a_rented_machine_without_its_volume_is_refused(tmp_path: Path) -> None:
    orders = orders_for(tmp_path / "volume")
    with pytest.raises(EnvironmentFault, match="no directory"):
        make_place(orders, 0, {"RUNPOD_POD_ID": "abc"})
    assert not (tmp_path / "volume").exists()
    assert make_place(orders, 1, {}).path == tmp_path / "volume" / "jobs" / "try" / "node-1"


def test_nodes_know_their_rank(tmp_path: Path) -> None:
    two = orders_for(tmp_path, nodes=2)
    assert node_rank(two, {"JOB_COMPLETION_INDEX": "1"}) == 1
    assert node_rank(orders_for(tmp_path), {"NODE_RANK": "7"}) == 0
    for environ in ({}, {"NODE_RANK": "2"}, {"NODE_RANK": "0", "JOB_COMPLETION_INDEX": "1"}):
        with pytest.raises(ConfigError, match="does not know which it is"):
            node_rank(two, environ)


def test_orders_are_read_from_the_environment_or_named_as_wrong(tmp_path: Path) -> None:
    orders = orders_for(tmp_path)
    assert read_orders(None, {"TRAINWAY_ORDERS": orders.model_dump_json()}) == orders
    for text, said in (
        ("", "no orders"),
        ("{", "not JSON"),
        ('{"job": "x/y"}', "does not understand|not what"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_orders(None, {"TRAINWAY_ORDERS": text})


def test_secrets_are_read_once_and_their_file_is_gone(tmp_path: Path) -> None:
    job_dir = JobDir(tmp_path)
    job_dir.secrets.write_text("HF_TOKEN='canary $(touch x)'\n")
    environ: dict[str, str] = {}
    assert take_secrets(job_dir, environ) == ["HF_TOKEN"]
    assert environ == {"HF_TOKEN": "canary $(touch x)"}
    assert not job_dir.secrets.exists()
    job_dir.secrets.write_text("HF_TOKEN canary")
    with pytest.raises(ConfigError) as raised:
        take_secrets(job_dir, environ)
    assert "canary" not in str(raised.value)
    assert not job_dir.secrets.exists()


def test_only_a_pod_that_is_there_for_the_job_is_stopped_when_it_cannot_begin(tmp_path: Path) -> None:
    from trainway.pod.__main__ import is_first_of_pod

    pod = {"RUNPOD_POD_ID": "p1"}
    runpod = orders_for(tmp_path, ender="runpod")
    assert is_first_of_pod(None, pod, 1, 0)
    assert is_first_of_pod(runpod, pod, 7, 1)
    assert not is_first_of_pod(runpod, pod, 70, 60)  # by hand, beside the job
    assert not is_first_of_pod(orders_for(tmp_path), pod, 1, 0)
    assert not is_first_of_pod(runpod, {}, 1, 0)
    assert not is_first_of_pod(runpod, {**pod, "NODE_RANK": "1"}, 1, 0)
