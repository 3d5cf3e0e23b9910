"""A run on a machine without it comes back from its copy before anything else is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.copied_runs import ToyRun
from tests.pod_material import orders_for
from trainway.jobs.orders import JobDir
from trainway.pod.copying import main
from trainway.pod.stages import COPYING, place_of, preparation


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, copy, back = ToyRun(tmp_path / "run"), str(tmp_path / "copy"), tmp_path / "back"
    assert main(["back", copy, str(back)]) == 0
    assert "the run begins" in capsys.readouterr().out and not back.exists()
    run.train(10)
    run.train(20)
    assert main(["run", str(run.dir.path), copy]) == 0
    assert main(["back", copy, str(back)]) == 0
    assert "goes on from step 20" in capsys.readouterr().out
    assert (back / "metrics.jsonl").read_bytes() == run.dir.metrics.read_bytes()
    same_checkpoint(back, run.dir.path, 20)


def same_checkpoint(left: Path, right: Path, step: int) -> None:
    names = [p.relative_to(right) for p in (right / f"checkpoints/step-{step}").rglob("*") if p.is_file()]
    assert len(names) >= 3
    assert all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_what_is_wrong_is_said_in_three_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "nothing"), str(tmp_path / "copy")]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_only_a_machine_without_the_run_takes_it(tmp_path: Path) -> None:
    orders = orders_for(tmp_path, sync="s3://bucket/run")
    place = place_of(orders, JobDir.of(tmp_path, orders.job), 0)
    first = preparation(orders, place)[0]
    assert first.command == (*COPYING, "back", "s3://bucket/run", str(place.run.path))
    place.run.checkpoints.mkdir(parents=True)
    assert all(step.command[:3] != COPYING for step in preparation(orders, place))
    assert all(
        step.command[:3] != COPYING for step in preparation(orders.model_copy(update={"sync": None}), place)
    )
