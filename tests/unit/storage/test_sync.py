"""A run's copy: what counts as complete is complete at every instant, and a second pass makes up for a killed one."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest

from tests.copied_runs import DyingStore, Killed, ToyRun, complete_steps, contents, same_run
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.storage import ledger
from trainway.storage.ledger import LEDGER
from trainway.storage.restore import find_run, restore
from trainway.storage.run_files import whole_lines
from trainway.storage.store import Content, DirectoryStore, Entry
from trainway.storage.sync import Syncer, copy_run


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written must not depend on how fast this machine is."""
    monkeypatch.setattr(ledger, "SAVE_EVERY_S", float("inf"))


def syncer(run: ToyRun, store: DirectoryStore) -> Syncer:
    found = Syncer(run.dir.path, str(store.folder))
    found._store = store
    return found


def test_a_copy_restored_is_the_run(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    for step in (10, 20, 30):
        run.train(step, best=step == 10)
    (run.dir.path / "run.lock").touch()
    (run.dir.path / "half.tmp-1").write_text("never")
    assert copy_run(run.dir.path, str(tmp_path / "copy")) == 30
    assert complete_steps(tmp_path / "copy") == {10, 20, 30}
    assert (tmp_path / "copy" / "checkpoints" / "best").read_text() == "step-10\n"
    assert not (tmp_path / "copy" / "half.tmp-1").exists()
    assert find_run(str(tmp_path / "copy")) == 30

    found = restore(str(tmp_path / "copy"), tmp_path / "back")
    assert (found.step, found.steps, found.skipped) == (30, (10, 30), ())
    (run.dir.path / "half.tmp-1").unlink()
    run.store._retire(20)  # the newest and the best are brought back
    same_run(run.dir.path, tmp_path / "back")


def test_what_is_there_is_not_sent_again(tmp_path: Path) -> None:
    run, store = ToyRun(tmp_path / "run"), DyingStore(tmp_path / "copy")
    run.train(10)
    syncer(run, store).copy_now()
    sent = store.operations
    assert sent == 9  # ledger, two files, config and metrics, marker, ledger, pointer, ledger
    syncer(run, store).copy_now()
    assert store.operations == sent
    # neither is a file whose time stamp alone is new; one whose bytes are new is
    run.dir.config.touch()
    syncer(run, store).copy_now()
    assert store.operations == sent
    run.dir.metrics.write_text('{"step": 11}\n')
    syncer(run, store).copy_now()
    assert store.operations == sent + 2  # it, and the ledger


def test_what_was_altered_or_lost_there_is_sent_again(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    copy_run(run.dir.path, str(tmp_path / "copy"))
    (tmp_path / "copy" / "config.yaml").unlink()
    (tmp_path / "copy" / "metrics.jsonl").write_text("x")
    copy_run(run.dir.path, str(tmp_path / "copy"))
    for name in ("config.yaml", "metrics.jsonl"):
        assert (tmp_path / "copy" / name).read_bytes() == (run.dir.path / name).read_bytes()


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_operation_no_half_checkpoint_counts_and_the_next_pass_completes(
    tmp_path: Path, after: bool
) -> None:
    """From one complete checkpoint at the target to three newer ones, of which one replaces it."""
    for dies_at in range(1, 100):
        run = ToyRun(tmp_path / f"run-{dies_at}", size=20)
        copy = tmp_path / f"copy-{dies_at}"
        run.train(10)
        copy_run(run.dir.path, str(copy))
        for step in (20, 30, 40):
            run.train(step, best=step == 20)
        store = DyingStore(copy, dies_at, after=after)
        try:
            syncer(run, store).copy_now()
        except Killed:
            there = complete_steps(copy)
            assert there, "at no instant there is none"
            metrics = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
            assert max(there) in metrics
            back = tmp_path / f"back-{dies_at}"
            assert restore(str(copy), back).step == max(there)
            assert syncer(run, DirectoryStore(copy)).copy_now() == 40
            assert complete_steps(copy) == {20, 30, 40}
            assert {n: b for n, b in contents(run.dir.path).items() if n.startswith("checkpoints/step")} == {
                n: b for n, b in contents(copy).items() if n.startswith("checkpoints/step")
            }
        else:
            assert dies_at > 15  # it has died at each of those before
            return
    raise AssertionError("it never came to its end")


def test_pruned_checkpoints_go_only_when_a_newer_one_is_there(tmp_path: Path) -> None:
    class Refusing(DirectoryStore):
        def put(self, name: str, content: Content) -> Entry:
            if name.startswith("checkpoints/step-30/"):
                raise EnvironmentFault("no room")
            return super().put(name, content)

    run, copy = ToyRun(tmp_path / "run", keep_last=1), tmp_path / "copy"
    run.train(10)
    run.train(20)
    copy_run(run.dir.path, str(copy))
    assert complete_steps(copy) == {20}
    run.train(30)  # 20 is pruned here
    with pytest.raises(EnvironmentFault):
        syncer(run, Refusing(copy)).copy_now()
    assert complete_steps(copy) == {20}
    copy_run(run.dir.path, str(copy))
    assert complete_steps(copy) == {30}
    assert not (copy / "checkpoints" / "step-20").exists()


def test_a_damaged_checkpoint_here_is_told_and_never_counts_there(tmp_path: Path) -> None:
    run, copy = ToyRun(tmp_path / "run"), tmp_path / "copy"
    run.train(10)
    run.train(20)
    path = run.dir.checkpoints / "step-20" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="step-20"):
        copy_run(run.dir.path, str(copy))
    assert complete_steps(copy) == {10}
    path.unlink()  # a file that is missing is no endless pass
    with pytest.raises(DataError, match="step-20"):
        copy_run(run.dir.path, str(copy))


def test_a_future_that_the_run_has_turned_away_from_is_not_restored(tmp_path: Path) -> None:
    run, copy = ToyRun(tmp_path / "run", keep_last=9), tmp_path / "copy"
    for step in (10, 20, 30):
        run.train(step)
    copy_run(run.dir.path, str(copy))
    run.store.discard_after(10)
    run.train(20, salt="other")
    # killed at once after the first thing that it writes there
    with pytest.raises(Killed):
        syncer(run, DyingStore(copy, 1, after=True)).copy_now()
    assert restore(str(copy), tmp_path / "back").step == 10
    copy_run(run.dir.path, str(copy))
    assert complete_steps(copy) == {10, 20}
    assert b"20other" in (copy / "checkpoints/step-20/model/model.safetensors").read_bytes()


def test_another_run_does_not_overwrite_a_copy(tmp_path: Path) -> None:
    first, second = ToyRun(tmp_path / "first"), ToyRun(tmp_path / "second")
    first.train(10)
    second.train(90)
    copy_run(first.dir.path, str(tmp_path / "copy"))
    before = contents(tmp_path / "copy")
    with pytest.raises(ConfigError, match="another run"):
        copy_run(second.dir.path, str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == before
    # one copy more elsewhere leaves the first one known
    copy_run(first.dir.path, str(tmp_path / "more"))
    first.train(20)
    assert copy_run(first.dir.path, str(tmp_path / "copy")) == 20


def test_the_syncer_lives_through_failures_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    run, stop = ToyRun(tmp_path / "run"), Event()
    run.train(10)

    class Failing(DirectoryStore):
        failures = 2

        def entries(self, prefix: str = "") -> dict[str, Entry]:
            if self.failures:
                self.failures -= 1
                raise ValueError("a secret")
            return super().entries(prefix)

    follower = Syncer(run.dir.path, str(tmp_path / "copy"), say=said.append)
    follower._store = Failing(tmp_path / "copy")
    assert not follower.try_pass()
    state = json.loads((run.dir.path / "sync.json").read_text())
    assert (state["state"], state["error"]) == ("failed", "internal error: ValueError")
    stop.set()
    assert follower.follow(0.01, stop)
    state = json.loads((run.dir.path / "sync.json").read_text())
    assert (state["state"], state["step"], state["error"]) == ("done", 10, "")
    assert said == [
        "sync: internal error: ValueError",
        *said[1:2],
        f"sync: step 10 is at {tmp_path / 'copy'}",
    ]


def test_a_growing_file_is_copied_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.dir.metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    copy_run(run.dir.path, str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_whole_lines_of_a_file_without_an_end_of_line_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"a\n" + b"x" * 200_000)
    assert whole_lines(path, 200_002) == 2
    assert whole_lines(path, 1) == 0
    assert whole_lines(tmp_path / "gone", 5) == 0


def test_the_newest_damaged_copy_is_passed_over(tmp_path: Path) -> None:
    run, copy = ToyRun(tmp_path / "run"), tmp_path / "copy"
    run.train(10)
    run.train(20)
    copy_run(run.dir.path, str(copy))
    path = copy / "checkpoints" / "step-20" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    found = restore(str(copy), tmp_path / "back")
    assert found.step == 10
    assert [step for step, _ in found.skipped] == [20]
    assert not (tmp_path / "back" / "checkpoints" / "step-20").exists()


def test_a_run_that_is_further_on_is_not_restored_over(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    copy_run(run.dir.path, str(tmp_path / "copy"))
    run.train(20)
    with pytest.raises(ConfigError, match="at step 20"):
        restore(str(tmp_path / "copy"), run.dir.path)
    with pytest.raises(DataError, match="holds no run"):
        restore(str(tmp_path / "nothing"), tmp_path / "back")
    assert find_run(str(tmp_path / "nothing")) is None


def test_a_ledger_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    copy_run(run.dir.path, str(tmp_path / "copy"))
    path = tmp_path / "copy" / LEDGER
    path.write_text(path.read_text().replace("metrics.jsonl", "../metrics.jsonl"))
    with pytest.raises(DataError, match="unsafe name"):
        restore(str(tmp_path / "copy"), tmp_path / "back")


def test_the_directory_that_was_brought_back_last_writes_the_copy(tmp_path: Path) -> None:
    """A machine that was thought dead lives: it must not remove what the one in its place has made since."""
    url = str(tmp_path / "copy")
    run = ToyRun(tmp_path / "run")
    run.train(10)
    first = syncer(run, DirectoryStore(tmp_path / "copy"))
    assert first.copy_now() == 10
    restore(url, tmp_path / "back")
    assert first.copy_now() == 10  # nobody has gone on from there yet
    back = ToyRun(tmp_path / "back")
    back.train(20)
    second = syncer(back, DirectoryStore(tmp_path / "copy"))
    assert second.copy_now() == 20
    run.train(30)
    before = contents(tmp_path / "copy")
    for _ in range(2):
        with pytest.raises(ConfigError, match="goes on elsewhere"):
            first.copy_now()
        first = syncer(run, DirectoryStore(tmp_path / "copy"))  # nor after another start
    assert contents(tmp_path / "copy") == before
    back.train(40)
    assert second.copy_now() == 40 and complete_steps(tmp_path / "copy") == {20, 40}


def test_of_two_that_were_brought_back_the_first_to_copy_goes_on(tmp_path: Path) -> None:
    url, runs = str(tmp_path / "copy"), []
    run = ToyRun(tmp_path / "run")
    run.train(10)
    copy_run(run.dir.path, url)
    for name in ("a", "b"):
        restore(url, tmp_path / name)
        runs.append(ToyRun(tmp_path / name))
        runs[-1].train(20)
    assert copy_run(runs[1].dir.path, url) == 20
    with pytest.raises(ConfigError, match="goes on elsewhere"):
        copy_run(runs[0].dir.path, url)
    assert copy_run(runs[1].dir.path, url) == 20
    # brought back once more, from what is there now
    restore(url, tmp_path / "c")
    assert copy_run(tmp_path / "c", url) == 20


def test_two_that_copy_one_directory_see_each_other(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    stores = [DyingStore(tmp_path / "copy"), DyingStore(tmp_path / "copy")]
    first = syncer(run, stores[0])
    first.copy_now()
    second = syncer(run, stores[1])
    second.copy_now()
    assert stores[1].operations == 0
    run.train(20)
    first.copy_now()
    sent = stores[1].operations
    second.copy_now()
    assert stores[1].operations == sent and complete_steps(tmp_path / "copy") == {10, 20}


def test_a_file_of_an_odd_name_keeps_no_checkpoint_from_being_copied(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    for name in ("back\\slash.txt", "new\nline", "$(touch x);'\"<script> ü%+&=.txt"):
        (run.dir.path / name).write_text("x\n")
    with pytest.raises(DataError, match=r"2 files .* were not copied"):
        copy_run(run.dir.path, str(tmp_path / "copy"))
    assert complete_steps(tmp_path / "copy") == {10} and find_run(str(tmp_path / "copy")) == 10
    assert (tmp_path / "copy" / "$(touch x);'\"<script> ü%+&=.txt").read_text() == "x\n"


def test_a_file_that_is_replaced_while_it_is_copied_is_of_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashed, then sent: in between another version has taken its place."""
    run = ToyRun(tmp_path / "run")
    run.train(10)
    state = run.dir.path / "state.json"
    state.write_text(json.dumps({"version": 1}))
    store = DirectoryStore(tmp_path / "copy")
    put, sent = store.put, list[str]()

    def replaced(name: str, content: Content) -> Entry:
        if name == "state.json":
            state.write_text(json.dumps({"version": 2, "and": "longer than before"}))
            sent.append(b"".join(content.blocks()).decode())
        return put(name, content)

    monkeypatch.setattr(store, "put", replaced)
    syncer(run, store).copy_now()
    assert [json.loads(text)["version"] for text in sent] == [1, 2]
