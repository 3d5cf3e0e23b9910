"""The feeding process's way with a tracker that fails, comes back, or shows another future."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainway.run_dir import RunDir
from trainway.tracking import feed
from trainway.tracking.feed import Feeder, follow
from trainway.tracking.target import Orders, Row, Target


class Held:
    """A tracker in memory. `broken`: how many more calls fail."""

    def __init__(self) -> None:
        self.runs: list[dict[int, dict[str, float]]] = []
        self.broken = 0
        self.closed: list[str] = []

    def open(self, target: Target) -> Opened:
        self.fail()
        if "run" not in target.recall():
            self.runs.append({})
            target.remember(run=len(self.runs) - 1)
        return Opened(self, self.runs[target.recall()["run"]])

    def fail(self) -> None:
        if self.broken:
            self.broken -= 1
            raise ConnectionError("no route to token hf_" + "a" * 30)


class Opened:
    where = "here"

    def __init__(self, held: Held, rows: dict[int, dict[str, float]]) -> None:
        self._held, self._rows = held, rows
        self.last_step = max(rows, default=-1)

    def has(self, name: str, step: int) -> bool:
        return step <= self.last_step

    def send(self, rows: list[Row]) -> None:
        for row in rows:
            self._held.fail()
            assert row.step not in self._rows, "sent twice"
            self._rows[row.step] = row.numbers

    def close(self, outcome: str) -> None:
        self._held.closed.append(outcome)


class Script:
    """The run's end, after so many looks at it; `then` is called before each look."""

    def __init__(self, looks: int, then: Any = None, word: str = "done") -> None:
        self.looks, self.then = looks, then
        self.outcome: str | None = None
        self.whole = False
        self.word = word

    def wait(self, seconds: float) -> None:
        if self.then is not None:
            self.then(self.looks)
        self.looks -= 1
        if self.looks == 0:
            self.outcome, self.whole = self.word, self.word != "failed"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(feed, "open_service", held.open)
    monkeypatch.setattr(feed, "LAST_PAUSE_S", 0.0)
    return held


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(feed, "say", lambda what, **more: said.append({"say": what, **more}))
    return said


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.config.write_text("{}\n")
    return run


def write(run: RunDir, steps: range, value: float = 1.0) -> None:
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step, "train/loss": value}) + "\n" for step in steps)


def rows(steps: range, value: float = 1.0) -> dict[int, dict[str, float]]:
    return {step: {"train/loss": value} for step in steps}


def test_it_follows_what_is_written_to_the_end(run: RunDir, held: Held, said: list[dict[str, Any]]) -> None:
    write(run, range(1, 4))
    seen = []

    def then(looks: int) -> None:
        seen.append(set(held.runs[0]))
        write(run, range(4, 14) if looks == 2 else range(14, 24))

    assert follow(Feeder(run, "wandb", Orders()), Script(2, then)) == 0  # type: ignore[arg-type]
    assert seen == [{1, 2}, set(range(1, 13))], "the newest step waits for its evaluation"
    assert held.runs == [rows(range(1, 24))] and held.closed == ["done"]
    assert said[-1] == {"say": "complete"} and [s["say"] for s in said].count("lost") == 0


def test_a_lost_tracker_is_told_once_and_gets_all_when_it_is_back(
    run: RunDir, held: Held, said: list[dict[str, Any]]
) -> None:
    write(run, range(1, 4))

    def then(looks: int) -> None:
        if looks == 9:
            held.broken = 6
            write(run, range(4, 8))

    assert follow(Feeder(run, "wandb", Orders()), Script(10, then)) == 0  # type: ignore[arg-type]
    told = [event["say"] for event in said if event["say"] in ("lost", "back", "complete")]
    assert told == ["lost", "back", "complete"]
    (lost,) = [event for event in said if event["say"] == "lost"]
    assert lost["why"] == "ConnectionError: no route to token ***"
    assert held.runs == [rows(range(1, 8))]


def test_it_tries_on_when_the_run_has_ended(run: RunDir, held: Held, said: list[dict[str, Any]]) -> None:
    write(run, range(1, 4))
    held.broken = 5
    assert follow(Feeder(run, "wandb", Orders()), Script(1)) == 0  # type: ignore[arg-type]
    assert held.runs == [rows(range(1, 4))] and said[-1] == {"say": "complete"}


def test_the_last_step_of_a_killed_run_waits_for_its_resume(
    run: RunDir, held: Held, said: list[dict[str, Any]]
) -> None:
    write(run, range(1, 9))
    assert follow(Feeder(run, "wandb", Orders()), Script(1, word="failed")) == 0  # type: ignore[arg-type]
    assert held.runs == [rows(range(1, 8))] and held.closed == ["failed"]
    run.metrics.write_text("")
    write(run, range(1, 6))  # cut back to the checkpoint of step 5, and gone on
    write(run, range(6, 12), value=1.0)
    assert follow(Feeder(run, "wandb", Orders(first_step=6)), Script(1)) == 0  # type: ignore[arg-type]
    assert held.runs == [rows(range(1, 12))], "the same run, no step twice"


def test_other_settings_from_an_earlier_step_are_a_run_of_their_own(
    run: RunDir, held: Held, said: list[dict[str, Any]]
) -> None:
    write(run, range(1, 9))
    follow(Feeder(run, "wandb", Orders(settings="a")), Script(1))  # type: ignore[arg-type]
    run.metrics.write_text("")
    write(run, range(1, 6))
    write(run, range(6, 12), value=2.0)
    follow(Feeder(run, "wandb", Orders(settings="b", first_step=6)), Script(1))  # type: ignore[arg-type]
    assert held.runs == [rows(range(1, 9)), rows(range(1, 6)) | rows(range(6, 12), 2.0)]
    write(run, range(12, 15))
    follow(Feeder(run, "wandb", Orders(settings="c", first_step=12)), Script(1))  # type: ignore[arg-type]
    assert len(held.runs) == 2, "what it shows is still true"
    assert sorted(held.runs[1]) == list(range(1, 15))
