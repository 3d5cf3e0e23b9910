"""What the cluster says of a job comes out in words."""

from __future__ import annotations

from typing import Any

import pytest

from trainway.jobs.kubernetes.states import (
    ending,
    event_line,
    is_complete,
    is_finished,
    job_status,
    latest_pods,
    pod_index,
    timestamp,
    trouble,
)


def workload(*conditions: str, **spec: Any) -> dict[str, Any]:
    held = [{"type": one, "status": "True", "reason": "Because", "message": "of this"} for one in conditions]
    return {"metadata": {"name": "w"}, "spec": spec, "status": {"conditions": held}}


def pod(index: int = 0, made: str = "2026-01-01T00:00:00Z", **status: Any) -> dict[str, Any]:
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    metadata = {"name": f"w-{index}-abcde", "labels": labels, "creationTimestamp": made}
    return {"metadata": metadata, "spec": {"nodeName": "gpu-7"}, "status": status}


def container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "trainway", "state": state}]}


RUNNING = {"phase": "Running", **container(running={})}


@pytest.mark.parametrize(
    ("kind", "found", "pods", "state", "detail"),
    [
        ("Job", None, [], "gone", "there is no such Job"),
        ("Job", workload("Complete"), [], "gone", "complete: every node has ended well"),
        ("JobSet", workload("Completed"), [], "gone", "complete: every node has ended well"),
        ("Job", workload("Failed"), [], "failed", "Because: of this"),
        ("Job", workload("FailureTarget"), [pod(**RUNNING)], "failed", "Because: of this"),
        ("Job", workload(suspend=True), [], "stopped", "suspended: `trainway up` goes on"),
        ("StatefulSet", workload(replicas=0), [], "stopped", "no replicas: `trainway up` goes on"),
        ("Job", workload(), [], "starting", "0 of 2 running"),
        ("Job", workload(), [pod(**RUNNING)], "starting", "1 of 2 running"),
        ("Job", workload(), [pod(0, **RUNNING), pod(1, **RUNNING)], "running", "2 of 2 running"),
    ],
)
def test_states(kind: str, found: Any, pods: list[Any], state: str, detail: str) -> None:
    status = job_status(kind, found, pods, 2)
    assert (status.machine, status.detail) == (state, detail)


def test_a_job_in_a_queue_waits_and_is_not_stopped() -> None:
    found = workload(suspend=True)
    found["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    assert job_status("Job", found, [], 1).machine == "starting"


def test_a_job_that_is_deleted_is_stopping() -> None:
    found = workload()
    found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert job_status("Job", found, [pod(**RUNNING)], 1).machine == "stopped"


def test_conditions_that_are_false_do_not_count() -> None:
    found = workload("Complete")
    found["status"]["conditions"][0]["status"] = "False"
    assert not is_finished(found) and not is_complete(found)
    assert is_finished(workload("Failed")) and not is_complete(workload("Failed"))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (container(waiting={"reason": "ImagePullBackOff", "message": "no such tag"}), "ImagePullBackOff: no such tag"),
        (container(terminated={"exitCode": 137, "reason": "OOMKilled"}), "exit code 137 (OOMKilled)"),
        (container(terminated={"exitCode": 0, "reason": "Completed"}), ""),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}]},
            "Unschedulable: no GPU",
        ),
        ({"reason": "Evicted", "message": "The node was low on memory."}, "Evicted: The node was low on memory."),
        (RUNNING, ""),
    ],
)  # fmt: skip
def test_trouble(status: dict[str, Any], expected: str) -> None:
    assert trouble(pod(**status)) == expected


def test_a_crash_loop_names_how_it_ended_before() -> None:
    held = container(waiting={"reason": "CrashLoopBackOff"})
    held["containerStatuses"][0]["lastState"] = {
        "terminated": {"exitCode": 2, "reason": "Error", "message": "error: optim.lr is -1\nfix: use 1e-3"}
    }
    assert trouble(pod(**held)) == (
        "CrashLoopBackOff: before that exit code 2 (the configuration is wrong): fix: use 1e-3"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, "the configuration is wrong"),
        (3, "the data is wrong"),
        (4, "the machine lacks something"),
        (75, "stopped with a checkpoint saved"),
        (143, "ended before it could save"),
    ],
)
def test_exit_codes_are_told_by_their_meaning(code: int, words: str) -> None:
    assert ending({"exitCode": code, "reason": "Error"}) == f"exit code {code} ({words})"


def test_a_failed_job_shows_its_nodes() -> None:
    bad = pod(1, phase="Failed", **container(terminated={"exitCode": 137, "reason": "OOMKilled"}))
    status = job_status("Job", workload("Failed"), [pod(0, **RUNNING), bad], 2)
    assert status.nodes == (
        "node 0: Running, on gpu-7",
        "node 1: Failed, on gpu-7: exit code 137 (OOMKilled)",
    )


def test_a_replaced_pod_is_not_counted() -> None:
    old = pod(0, "2026-01-01T00:00:00Z", phase="Failed", **container(terminated={"exitCode": 1}))
    new = pod(0, "2026-01-01T00:05:00Z", **RUNNING)
    assert latest_pods([new, old]) == [new]
    assert job_status("Job", workload(), [new, old], 1).machine == "running"


def test_the_number_of_a_pod() -> None:
    assert pod_index(pod(3)) == 3
    assert pod_index({"metadata": {"name": "w-2", "labels": {"apps.kubernetes.io/pod-index": "2"}}}) == 2
    assert pod_index({"metadata": {"name": "w-11"}}) == 11
    assert pod_index({"metadata": {"name": "w-upload"}}) == 0


def test_events_are_one_line() -> None:
    event = {"involvedObject": {"name": "w-0"}, "reason": "FailedMount", "message": "volume\n  is busy"}
    assert event_line(event) == "w-0: FailedMount: volume is busy"


def test_times() -> None:
    assert timestamp("1970-01-01T00:01:00Z") == 60
    assert timestamp(None) is None
