"""The supervisor's own faults and those of its machine, between two of its steps."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pod_material import orders_for
from trainway.pod import supervisor as module
from trainway.pod.guard import Verdict
from trainway.pod.progress import look
from trainway.pod.stages import Step, write_orders
from trainway.pod.start import make_place
from trainway.pod.supervisor import Supervisor
from trainway.run_dir import RunDir


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    orders = orders_for(tmp_path)
    found = Supervisor(orders, make_place(orders, 0, {}), 0, dict(os.environ), ("true",))
    yield found
    found.journal.close()


def test_a_signal_that_comes_when_the_training_is_done_is_not_lost(supervisor: Supervisor) -> None:
    supervisor.signals.asked = True
    supervisor._conclude(Verdict("done"))
    assert supervisor.signals.asked  # what comes after the training is for the next start
    supervisor._conclude(Verdict("stop", "stopped on request"))
    assert not supervisor.signals.asked


@pytest.mark.parametrize(
    ("stage", "kind"), [("train", "again"), ("release", "again"), ("sync", "again"), ("prepare", "failed")]
)
def test_a_command_that_cannot_be_started_for_now_is_tried_again_where_that_may_help(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, stage: module.Stage, kind: str
) -> None:
    def full(command: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(supervisor, "_start", full)
    verdict = supervisor._run(Step(stage, ("true",)))
    assert verdict.kind == kind
    assert verdict.reason == f"{stage} cannot be started: Resource temporarily unavailable"


def test_a_record_of_garbage_is_no_step_and_no_fault(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_bytes(
        b'{"step": 7}\n' + b"[" * 9999 + b"\n\xff\x00\n{}\n[1]\n" + b'{"step": "x"}\n{"st'
    )
    assert look(run).step == 7


def test_a_copy_of_the_orders_that_is_damaged_is_written_anew(supervisor: Supervisor) -> None:
    supervisor.place.job_dir.orders.write_bytes(b"\xff\xfe\x00")
    write_orders(supervisor.orders, supervisor.place)
    assert (
        type(supervisor.orders).model_validate_json(supervisor.place.job_dir.orders.read_text())
        == supervisor.orders
    )
