"""Saving, finding, keeping and describing checkpoints."""

import json
import os

import pytest

from trainway.checkpoint.store import CheckpointStore
from trainway.errors import ConfigError, DataError, EnvironmentFault


def content(step):
    def write(directory):
        (directory / "model").mkdir()
        (directory / "model" / "weights.bin").write_bytes(bytes([step % 256]) * 1000)
        (directory / "state.json").write_text(f'{{"step": {step}}}')

    return write


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def save(store, *steps, best=()):
    for step in steps:
        store.save(step, content(step), best=step in best, info={"step": step})


def links(store):
    return {
        name: os.readlink(store.directory / name)
        for name in ("latest", "best")
        if (store.directory / name).is_symlink()
    }


def test_save_publishes_everything(store):
    path = store.save(5, content(5), best=True, info={"val": (1.5, None), 3: "x"})
    assert path == store.directory / "step-5"
    assert store.verify(5) == []
    assert store.info(5) == {"val": [1.5, None], "3": "x"}
    assert links(store) == {"latest": "step-5", "best": "step-5"}
    assert sorted(p.name for p in store.directory.iterdir()) == ["best", "latest", "step-5"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert [(f["path"], f["size"]) for f in manifest["files"]] == [
        ("model/weights.bin", 1000),
        ("state.json", 11),
    ]


def test_phases_serve_several_ranks(store):
    temp = store.begin(3)
    for rank in range(2):
        store.write_into(temp, lambda d, rank=rank: (d / f"rank-{rank}").write_text("x") and None)
    assert store.steps() == []
    store.commit(3, temp)
    assert store.verify(3) == []
    assert (store.directory / "step-3" / "rank-1").exists()


def test_retention_keeps_the_newest_and_the_best(store):
    save(store, 1, 2, 3, 4, 5, best={2})
    assert store.steps() == [2, 4, 5]
    save(store, 6, best={6})
    assert store.steps() == [5, 6]


def test_the_one_just_saved_is_never_pruned(store):
    save(store, 10, 20, 5)
    assert store.steps() == [5, 10, 20]


def test_retention_ignores_the_clock(store):
    for step in (1, 2, 3):
        save(store, step)
        os.utime(store.directory / f"step-{step}", (10**9 - step * 10**6,) * 2)  # the clock runs backwards
    assert store.steps() == [2, 3]
    assert store.newest_intact()[0] == 3


def test_an_intact_checkpoint_is_not_written_again(store):
    path = store.save(5, content(5))
    before = (path / "model" / "weights.bin").stat().st_ino
    store.save(5, content(6), best=True)
    assert (path / "model" / "weights.bin").stat().st_ino == before
    assert links(store)["best"] == "step-5"
    assert store.verify(5) == []


def test_a_corrupt_checkpoint_is_replaced(store):
    path = store.save(5, content(5))
    (path / "state.json").write_text("")
    store.save(5, content(5))
    assert store.verify(5) == []
    assert sorted(p.name for p in store.directory.iterdir()) == ["latest", "step-5"]


def test_clean_removes_leftovers_and_repairs_the_links(store):
    save(store, 1, 2, best={1})
    (store.directory / "step-3.tmp-0123abcd").mkdir()
    (store.directory / "step-3.tmp-0123abcd" / "x").write_text("x")
    (store.directory / "latest.tmp-0123abcd").symlink_to("step-2")
    (store.directory / "latest").unlink()
    (store.directory / "best").unlink()
    (store.directory / "best").symlink_to("step-99")
    assert store.clean() == ["latest.tmp-0123abcd", "step-3.tmp-0123abcd"]
    assert links(store) == {"latest": "step-2", "best": "step-1"}
    assert store.clean() == []


def test_clean_of_nothing(store):
    assert store.clean() == []


def test_discard_after_drops_the_abandoned_future(store):
    store.keep_last = 9
    save(store, 1, 2, 3, 4, best={2, 4})
    assert store.discard_after(3) == [4]
    assert links(store) == {"latest": "step-3", "best": "step-2"}
    assert store.discard_after(0) == [1, 2, 3]
    assert links(store) == {}


def test_mark_best(store):
    save(store, 1, 2)
    store.mark_best(1)
    assert links(store)["best"] == "step-1"
    with pytest.raises(ConfigError):
        store.mark_best(9)


def test_describe(store):
    save(store, 1, 2, best={1})
    first, second = store.describe()
    assert (first.step, first.is_latest, first.is_best, first.info) == (1, False, True, {"step": 1})
    assert (second.step, second.is_latest, second.is_best) == (2, True, False)
    assert first.size_bytes > 1000
    (second.path / "manifest.json").write_text("{")
    assert store.describe()[1].info is None


def test_resolve(store):
    save(store, 1, 2, best={1})
    (store.directory / "latest").unlink()
    assert store.resolve("latest").name == "step-2"
    assert store.resolve("best").name == "step-1"
    assert store.resolve(1).name == store.resolve("1").name == "step-1"
    with pytest.raises(ConfigError, match="step 7") as caught:
        store.resolve(7)
    assert "steps 1, 2" in caught.value.why
    with pytest.raises(ConfigError, match="newest"):
        store.resolve("newest")
    (store.directory / "step-2" / "state.json").unlink()
    with pytest.raises(DataError, match="step-2") as corrupt:
        store.resolve("latest")
    assert "state.json: missing" in corrupt.value.why


def test_nothing_saved_yet(store):
    assert store.steps() == []
    assert store.newest_intact() is None
    for name in ("latest", "best"):
        with pytest.raises(ConfigError, match=f"no {name} checkpoint"):
            store.resolve(name)


def test_a_failing_writer_leaves_nothing(store):
    save(store, 1)

    def broken(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        store.save(2, broken)
    assert sorted(p.name for p in store.directory.iterdir()) == ["latest", "step-1"]


def test_only_plain_files_are_saved(store):
    with pytest.raises(ValueError, match="link"):
        store.save(1, lambda d: (d / "link").symlink_to("/etc/passwd"))
    assert store.steps() == []


def test_a_plain_file_in_the_way_is_a_fault(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(EnvironmentFault):
        CheckpointStore(tmp_path / "checkpoints", 1).save(1, content(1))


def test_keep_last_and_step_have_bounds(tmp_path):
    with pytest.raises(ConfigError):
        CheckpointStore(tmp_path, 0)
    with pytest.raises(ConfigError):
        CheckpointStore(tmp_path, 1).save(-1, content(1))
