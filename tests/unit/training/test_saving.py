"""Saves at once and beside the training: what is published, when, and what a failure leaves behind."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainway.checkpoint.state import TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import read_model_state
from trainway.config.schema import EngineConfig, ModelConfig, OptimConfig
from trainway.engines.single import SingleLearner
from trainway.engines.world import open_world
from trainway.errors import EnvironmentFault
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.load import build_model
from trainway.training import saving
from trainway.training.saving import Saver


def state(step: int) -> TrainState:
    return TrainState(step, 0, 0, None, None, None, 0, {}, {}, 0.0, "", "", "", "")


class Run:
    """A tiny learner with a saver, and the training step that the loop makes around it."""

    def __init__(self, root: Path, *, asynchronous: bool) -> None:
        with open_world(EngineConfig()) as world:
            self.model = build_model(
                ModelConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32), 64, seed=0
            )
            self.module = CausalLMLoss(self.model)
            self.learner = SingleLearner(self.module, self.model, OptimConfig(lr=0.1), world, "fp32")
            self.store = CheckpointStore(root, 2)
            self.published: list[int] = []
            self.saver = Saver(
                world, {"": self.learner}, self.store, {"": None}, asynchronous, lambda s: self.published.append(s.step)
            )  # fmt: skip

    def step(self) -> None:
        ids = torch.arange(32).view(2, 16)
        with self.learner.micro_step(sync=True):
            self.learner.backward(self.module(ids, ids), scale=1 / 32)
        self.saver.before_update()
        self.learner.step(1.0, 1.0, lambda norm: True)
        self.saver.advance(*self.saver.progress())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def stored(self, step: int) -> dict[str, torch.Tensor]:
        return read_model_state(self.store.directory / f"step-{step}/model")


def until(condition: Callable[[], bool], run: Run) -> None:
    for _ in range(2000):
        if condition():
            return
        run.step()
    raise AssertionError("it never happened")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path, asynchronous=asynchronous)
    expected = {}
    for step in range(1, 5):
        run.step()
        expected[step] = run.weights()
        run.saver.save(state(step))
        run.step()  # the weights change while files may still be written
    run.saver.finish()
    assert run.published == [1, 2, 3, 4]
    assert run.store.steps() == [3, 4] and run.store.verify(4) == []
    assert same(run.stored(3), expected[3]) and same(run.stored(4), expected[4])
    assert not same(expected[4], run.weights())
    assert run.saver.stalled_s > 0


def test_a_copy_is_complete_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copying thread is held back until training asks for the update: it must wait for it, not overtake it."""
    run = Run(tmp_path, asynchronous=True)
    run.step()
    expected, go = run.weights(), threading.Event()
    copy = run.saver._staging[""]._copy_on_cpu

    def slowly(key: str, tensor: torch.Tensor) -> torch.Tensor:
        go.wait(10)
        return copy(key, tensor)

    monkeypatch.setattr(run.saver._staging[""], "_copy_on_cpu", slowly)
    run.saver.save(state(1))
    threading.Timer(0.2, go.set).start()
    run.step()
    assert go.is_set()
    run.saver.finish()
    assert same(run.stored(1), expected)


def test_nothing_is_published_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, asynchronous=True)
    run.step()
    run.saver.save(state(1))
    run.saver.finish()
    write, go = saving.write_snapshot, threading.Event()

    def held(*arguments: object) -> None:
        go.wait(20)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_snapshot", held)
    run.saver.save(state(2))
    for _ in range(5):
        run.step()
    assert run.store.steps() == [1] and (tmp_path / "latest").resolve().name == "step-1"
    assert run.store.newest_intact()[0] == 1  # type: ignore[index]
    go.set()
    until(lambda: run.published == [1, 2], run)
    assert run.store.verify(2) == [] and (tmp_path / "latest").resolve().name == "step-2"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    run = Run(tmp_path, asynchronous=asynchronous)
    run.step()
    run.saver.save(state(1))
    run.saver.finish()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_snapshot", full)
    with pytest.raises(EnvironmentFault, match="could not be written"):
        run.saver.save(state(2))
        until(lambda: False, run)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-1"]
    assert run.store.verify(1) == []
    monkeypatch.undo()
    run.saver.save(state(3))  # the saver goes on
    run.saver.finish()
    assert run.store.steps() == [1, 3]


def test_waiting_for_the_save_before_counts_as_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, asynchronous=True)
    run.step()
    write, go = saving.write_snapshot, threading.Event()

    def held(*arguments: object) -> None:
        go.wait(20)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_snapshot", held)
    run.saver.save(state(1))
    run.step()
    before = run.saver.stalled_s
    threading.Timer(0.3, go.set).start()
    run.saver.save(state(2))  # cannot begin before the first one is on the disk
    assert run.saver.stalled_s - before > 0.2
    run.saver.finish()
    assert run.published == [1, 2]
