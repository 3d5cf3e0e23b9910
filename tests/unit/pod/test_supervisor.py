"""The supervisor in a process of its own, with stages that are fast and misbehave on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.pod_material import KEY, Job, orders_for, runpod
from trainway.pod.processes import JOB_MARK, find_all


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    for process in job.processes:
        process.kill()
        process.communicate()
    left = find_all(lambda environ: environ.get(JOB_MARK, "").startswith(str(tmp_path)))
    for process in left:
        process.kill()
    assert not left


def until(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(200)


def test_a_job_goes_through_its_stages_and_is_done_once(job: Job) -> None:
    orders = orders_for(job.root, release={"to": "exports/final"}, processes=2)
    assert job.run(orders) == 0
    assert job.verbs == ["doctor", "prepare", "train", "export"]
    config = str(job.dir.config)
    assert job.calls[2]["words"] == ["train", config, "--resume", "auto", "--nproc", "2"]
    assert {call["cwd"] for call in job.calls} == {str(job.root)}
    state = job.state
    assert (state.stage, state.outcome, state.step, state.saved_step) == ("ended", "done", 20, 20)
    assert (state.attempts, state.crashes, state.exit_code) == (1, 0, None)
    assert (job.root / "exports" / "final" / "model.safetensors").read_bytes() == b"weights"
    # the same bytes in the log on the volume and on standard output
    assert job.said == job.log
    assert [f"this is {verb}" in job.log for verb in ("doctor", "prepare", "train", "export")] == [True] * 4

    began = state.began
    assert job.run(orders) == 0
    assert len(job.calls) == 4
    assert job.state.began == began


def test_a_crash_is_started_again_from_the_saved_step(job: Job) -> None:
    job.tell("train", die_at=[15, -9], once=True)
    assert job.run(orders_for(job.root)) == 0
    assert job.steps == [*range(1, 16), *range(11, 21)]
    assert (job.state.outcome, job.state.attempts, job.state.crashes) == ("done", 2, 0)
    assert "exit code 137; it goes on from step 10" in job.log


def test_crashes_without_a_saved_step_are_bounded(job: Job) -> None:
    job.tell("train", die_at=[3, 1])
    assert job.run(orders_for(job.root, limits={"restarts": 2})) == 4
    assert job.verbs.count("train") == 3
    assert (job.state.outcome, job.state.exit_code, job.state.attempts) == ("failed", 1, 3)
    # an end of all restarts is no reason for the scheduler to begin again
    assert job.run(orders_for(job.root, limits={"restarts": 2})) == 4
    assert job.verbs.count("train") == 3


@pytest.mark.parametrize("code", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_fault_of_the_users_is_not_tried_again(job: Job, code: int) -> None:
    job.tell("train", die_at=[0, code])
    assert job.run(orders_for(job.root)) == code
    assert job.verbs.count("train") == 1
    assert (job.state.outcome, job.state.exit_code) == ("failed", code)


def test_what_the_doctor_finds_ends_the_job_before_anything_is_prepared(job: Job) -> None:
    job.tell("doctor", code=4)
    assert job.run(orders_for(job.root)) == 4
    assert job.verbs == ["doctor"]
    assert job.state.reason == "doctor: exit code 4; no step is saved"


def test_a_doctor_that_fails_itself_ends_nothing(job: Job) -> None:
    job.tell("doctor", code=1)
    assert job.run(orders_for(job.root)) == 0


def test_sigterm_is_passed_on_and_the_next_start_goes_on(job: Job) -> None:
    job.tell("train", step_s=0.1, once=True)
    process = job.start(orders_for(job.root))
    until(lambda: len(job.steps) >= 3)
    assert end(process) == 75
    saved = job.state.saved_step
    assert job.state.outcome == "stopped"
    assert saved == job.steps[-1] < 20
    assert job.run(orders_for(job.root)) == 0
    assert job.steps == list(range(1, 21))


def test_a_request_to_stop_holds_until_new_orders_come(job: Job) -> None:
    job.tell("train", step_s=0.1, once=True)
    orders = orders_for(job.root)
    process = job.start(orders)
    until(lambda: len(job.steps) >= 3)
    job.dir.stop_request.touch()
    assert process.wait(200) == 75
    assert job.run(orders) == 75  # as a container that is started again
    assert job.verbs.count("train") == 1
    assert job.run(orders.model_copy(update={"token": "2"})) == 0
    assert job.steps == list(range(1, 21))


def test_a_training_that_stands_still_is_ended_and_killed(job: Job) -> None:
    job.tell("train", hang_at=5, deaf=True)
    assert job.run(orders_for(job.root, limits={"stall_minutes": 0.02})) == 4
    assert job.state.outcome == "stalled"
    assert job.verbs.count("train") == 1
    assert "train has not ended in time, and is killed" in job.log


@pytest.mark.slow  # a training that hangs is proved above; e2e/test_pod.py stops a real one
def test_a_stopped_process_is_a_stall_too(job: Job) -> None:
    job.tell("train", step_s=0.05, hang_at=19)
    process = job.start(orders_for(job.root))
    until(lambda: len(job.steps) >= 2)
    psutil.Process(job.calls[-1]["pid"]).suspend()
    until(lambda: job.state.step == job.steps[-1])
    job.let_pass(1801)
    assert process.wait(200) == 4
    assert job.state.outcome == "stalled"


@pytest.mark.parametrize(
    "limits", [{"hours": 1.0}, pytest.param({"hours": None, "dollars": 6.0}, marks=pytest.mark.slow)]
)
def test_a_limit_saves_and_ends(job: Job, limits: dict[str, float]) -> None:
    job.tell("train", step_s=0.1, hang_at=19, once=True)
    orders = orders_for(job.root, limits=limits, dollars_per_hour=6.0)
    process = job.start(orders)
    until(lambda: len(job.steps) >= 3)
    job.let_pass(3600 - 120)  # what is left is for saving
    assert process.wait(200) == 4
    state = job.state
    assert state.outcome == ("deadline" if limits["hours"] else "budget")
    assert 0 < state.saved_step == job.steps[-1] < 20
    assert state.dollars >= 5.8
    assert job.run(orders) == 4  # the clock goes on, and nothing is started
    assert job.verbs.count("train") == 1


@pytest.mark.slow  # killing the deaf is proved by a stall above, limits by the test before
def test_a_limit_holds_for_a_training_that_hears_nothing(job: Job) -> None:
    job.tell("train", hang_at=2, deaf=True)
    process = job.start(orders_for(job.root, limits={"save_minutes": 0.02}))
    until(lambda: len(job.steps) >= 2)
    job.let_pass(3600)
    assert process.wait(200) == 4
    assert job.state.outcome == "deadline"
    assert "train has not ended in time, and is killed" in job.log


def test_files_that_never_come_end_the_job(job: Job) -> None:
    orders = orders_for(job.root, awaits_upload=True, limits={"upload_minutes": 0.01})
    assert job.run(orders) == 4
    assert job.verbs == []
    assert "have not come within 0.01 minutes" in job.state.reason


def test_the_files_are_waited_for(job: Job) -> None:
    process = job.start(orders_for(job.root, awaits_upload=True))
    until(lambda: job.dir.state.exists() and "waiting for the files" in job.log)
    assert job.verbs == []
    job.dir.uploaded.touch()
    assert process.wait(200) == 0


def test_a_supervisor_that_is_killed_leaves_a_training_that_saves_and_ends(job: Job) -> None:
    job.tell("train", step_s=0.1, once=True)
    process = job.start(orders_for(job.root))
    until(lambda: len(job.steps) >= 3)
    began = job.state.began
    process.kill()
    assert job.run(orders_for(job.root)) == 0
    assert job.steps == list(range(1, 21))  # it had saved before the next one began
    assert job.state.began == began


@pytest.mark.slow  # the lock itself has tests of its own
def test_a_second_supervisor_is_refused(job: Job) -> None:
    job.tell("train", step_s=2)
    process = job.start(orders_for(job.root))
    until(lambda: "train" in job.verbs)
    second = job.start(orders_for(job.root))
    assert second.wait(200) == 1  # the refusal is raised, and __main__ tells it
    assert end(process) == 75


def test_a_release_that_fails_is_tried_again_and_then_said(job: Job) -> None:
    job.tell("export", code=3)
    assert job.run(orders_for(job.root, release={"to": "exports/final"})) == 3
    assert job.verbs.count("export") == 3
    assert (job.state.outcome, job.state.incomplete) == ("done", True)
    assert "release failed: exit code 3" in job.state.reason


def test_the_machine_is_ended_by_the_users_command_however_often_it_takes(job: Job) -> None:
    evil = "$(touch x);'\""
    script = 'echo "$0" >> ended; test -e again || { touch again; exit 3; }'
    orders = orders_for(job.root, ender="command", end_command=["sh", "-c", script, evil])
    assert job.run(orders) == 0
    assert (job.root / "ended").read_text() == f"{evil}\n" * 2
    assert not (job.root / "x").exists()
    assert "(attempt 1): sh ended with exit code 3" in job.log
    assert job.state.machine_ended


def test_runpod_is_asked_until_it_agrees_and_then_again_instead_of_training(job: Job) -> None:
    def answers(number: int, method: str, path: str) -> int:
        return (429, 503, 204)[number - 1] if number <= 3 else 404

    with runpod(answers) as (address, requests):
        environ = {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "pod/1", "RUNPOD_API_KEY": KEY}
        orders = orders_for(job.root, ender="runpod")
        process = job.start(orders, **environ)
        until(lambda: job.dir.state.exists() and job.state.machine_ended)
        assert requests == [("POST", "/v2/pods/pod%2F1/action", '{"action": "terminate"}')] * 3
        assert process.poll() is None  # a container whose process ends is started again
        assert "NOT ended and goes on costing (attempt 2)" in job.log
        assert end(process) == 0

        calls = len(job.calls)
        process = job.start(orders, **environ)
        until(lambda: len(requests) == 5)  # a POST and a DELETE
        until(lambda: "is gone" in job.log)
        assert end(process) == 0
        assert len(job.calls) == calls
    assert KEY not in job.log + job.dir.state.read_text() + json.dumps(job.calls)


@pytest.mark.slow  # as test_ending.py has it, through the whole supervisor
def test_a_refused_terminate_becomes_a_delete(job: Job) -> None:
    with runpod(lambda number, method, path: 409 if method == "POST" else 204) as (address, requests):
        environ = {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "p1", "RUNPOD_API_KEY": KEY}
        process = job.start(orders_for(job.root, ender="runpod"), **environ)
        until(lambda: job.dir.state.exists() and job.state.machine_ended)
        assert [(method, path) for method, path, _ in requests] == [
            ("POST", "/v2/pods/p1/action"), ("DELETE", "/v2/pods/p1"),
        ]  # fmt: skip
        assert end(process) == 0


def test_a_supervisor_that_hangs_on_its_volume_is_ended_without_it(job: Job) -> None:
    """A fifo in the place of the run's record: whoever opens it waits for ever, as on a volume that does not answer."""
    job.tell("train", step_s=0.1)
    with runpod(lambda number, method, path: 200) as (address, requests):
        environ = {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "p1", "RUNPOD_API_KEY": KEY}
        process = job.start(orders_for(job.root, ender="runpod", limits={"save_minutes": 0.1}), **environ)
        until(lambda: len(job.steps) >= 2)
        record = job.root / "runs" / "try" / "metrics.jsonl"
        os.mkfifo(job.root / "fifo")
        os.replace(job.root / "fifo", record)
        job.let_pass(3600)  # the supervisor would act by itself
        time.sleep(1)
        assert requests == []
        job.let_pass(3600 + 720)
        until(lambda: len(requests) == 1)
        assert [body for _, _, body in requests] == ['{"action": "stop"}']
        process.kill()
        until(lambda: not find_all(lambda environ: environ.get(JOB_MARK) == str(job.dir.path)))


@pytest.mark.slow  # as test_ending.py has it, through the whole supervisor
def test_a_cluster_is_deleted_and_an_api_that_is_gone_is_asked_on(job: Job) -> None:
    with runpod(lambda number, method, path: 204) as (address, requests):
        pass
    environ = {"RUNPOD_POD_ID": "p1", "RUNPOD_CLUSTER_ID": "c1", "RUNPOD_API_KEY": KEY}
    process = job.start(orders_for(job.root, ender="runpod"), TRAINWAY_RUNPOD_API=f"{address}/v2", **environ)
    until(lambda: "(attempt 3)" in (job.log if job.dir.log.exists() else ""))
    assert "NOT ended and goes on costing" in job.state.reason
    assert "DELETE /v2/clusters/c1" in job.log
    assert not job.state.machine_ended
    assert end(process) == 0
    assert requests == []


def test_a_pod_ends_only_after_its_release_to_the_hub_is_complete(job: Job) -> None:
    job.tell("release", code=4, once=True)  # broken off; the same words complete it
    seen: list[list[str]] = []

    def answer(number: int, method: str, path: str) -> int:
        seen.append(job.verbs)
        return 200

    with runpod(answer) as (address, requests):
        environ = {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "p1", "RUNPOD_API_KEY": KEY}
        orders = orders_for(job.root, ender="runpod", release={"to": "hf://ada/model", "tag": "v2"})
        process = job.start(orders, **environ)
        until(lambda: job.dir.state.exists() and job.state.machine_ended)
        assert [body for _, _, body in requests] == ['{"action": "terminate"}']
        assert end(process) == 0
    assert seen == [["doctor", "prepare", "train", "release", "release"]]
    assert job.calls[3]["words"] == job.calls[4]["words"]
    assert job.calls[3]["words"][2:] == ["--repo", "ada/model", "--tag", "v2", "--which", "latest"]
    assert not job.state.incomplete


def test_a_pod_whose_release_is_missing_is_stopped_and_not_terminated(job: Job) -> None:
    job.tell("export", code=1)
    with runpod(lambda number, method, path: 200) as (address, requests):
        environ = {"TRAINWAY_RUNPOD_API": f"{address}/v2", "RUNPOD_POD_ID": "p1", "RUNPOD_API_KEY": KEY}
        orders = orders_for(job.root, ender="runpod", release={"to": "exports/final"})
        process = job.start(orders, **environ)
        until(lambda: job.dir.state.exists() and job.state.machine_ended)
        assert [body for _, _, body in requests] == ['{"action": "stop"}']
        assert end(process) == 4


def test_values_reach_the_stages_as_plain_text(job: Job) -> None:
    evil = "$(touch x);'\"\n`touch y` --flag"
    config = {**orders_for(job.root).config, "name": evil, "data": {"train": [evil]}}
    assert job.run(orders_for(job.root, config=config, release={"to": evil.replace("/", "")})) == 0
    import yaml

    assert yaml.safe_load(job.dir.config.read_text())["name"] == evil
    assert job.calls[3]["words"][3] == str(job.root / evil)
    assert not any((job.root / name).exists() for name in "xy")


def test_a_secret_reaches_the_training_and_no_file_and_no_command_line(job: Job) -> None:
    job.tell("train", step_s=0.05)
    job.dir.path.mkdir(parents=True)
    job.dir.secrets.write_text(f"HF_TOKEN={KEY}\n")
    process = job.start(orders_for(job.root))
    until(lambda: len(job.steps) >= 1)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(tree) >= 2
    assert tree[-1].environ()["HF_TOKEN"] == KEY
    assert not any(KEY in " ".join(each.cmdline()) for each in tree)
    assert process.wait(200) == 0
    files = [path for path in job.root.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
