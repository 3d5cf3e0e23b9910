"""What is said and noted when the disk takes nothing and nobody reads: the supervisor goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainway.errors import EnvironmentFault
from trainway.jobs.orders import JobDir, PodState
from trainway.pod import journal as module
from trainway.pod.journal import Clock, Journal


def new(tmp_path: Path) -> Journal:
    state = PodState(job="try", stage="train", began=0.0, updated=0.0)
    return Journal(JobDir(tmp_path), state, Clock())


def test_on_a_full_disk_lines_go_to_standard_output_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    journal = new(tmp_path)
    journal.say("before")
    kept, journal._file = journal._file, os.open("/dev/full", os.O_WRONLY)
    journal.say("while it is full")
    os.close(journal._file)
    journal._file = kept
    journal.say("after")
    journal.close()
    said = [line.split(" ", 2)[2] for line in capfd.readouterr().out.splitlines()]
    assert sorted(said) == ["after", "before", "while it is full"]
    assert "while" not in (tmp_path / "log.txt").read_text()


def test_a_reader_that_hangs_holds_nobody_up_even_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    monkeypatch.setattr(module, "_STDOUT", writer)
    journal = new(tmp_path)
    journal._file = os.open("/dev/full", os.O_WRONLY)
    for number in range(3000):  # more than are kept
        journal.say(f"line {number}")
    assert len(journal._copy._more) <= 1000
    os.close(reader)  # its thread is free again, and ends
    journal.close()
    os.close(writer)


def test_a_state_that_cannot_be_written_is_still_known_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise EnvironmentFault(f"cannot write {path}", "No space left on device")

    journal = new(tmp_path)
    journal.change(step=1)
    monkeypatch.setattr(module, "atomic_write", full)
    journal.change(step=2)
    monkeypatch.undo()
    assert journal.state.step == 2
    assert "the state cannot be written: cannot write" in (tmp_path / "log.txt").read_text()
    assert PodState.model_validate_json((tmp_path / "state.json").read_text()).step == 1  # the old one, whole
    journal.close()
