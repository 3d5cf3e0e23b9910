"""Checkpoints under fire: a crash or a failing disk at every file operation, and damage of every kind."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from trainway.checkpoint.manifest import read_manifest
from trainway.checkpoint.store import CheckpointStore
from trainway.errors import DataError, EnvironmentFault
from trainway.files import sealed_json

ROOT = Path(__file__).parents[2]
OPERATIONS = "open mkdir rename replace symlink unlink rmdir fsync scandir readlink lstat".split()


# ---- operations, counted


class Tripwire:
    """Counts file operations, in all threads, and calls `trip` instead of those from the k-th to the last one."""

    def __init__(self, k, trip, last=None):
        self.k, self.trip, self.last = k, trip, k if last is None else last
        self.counter = itertools.count()
        self.names = []
        self.flushed = set()

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        for name in OPERATIONS:
            self._wrap(os, name)
        self._wrap(builtins, "open")
        self._wrap(io, "open")  # pathlib's
        return self

    def __exit__(self, *_):
        self.undo.close()

    def _wrap(self, module, name):
        original = getattr(module, name)

        def counted(*arguments, **options):
            self.names.append(name)
            if self.k <= next(self.counter) <= self.last:
                self.trip()
            if name == "fsync":
                self.flushed.add(os.fstat(arguments[0]).st_ino)
            return original(*arguments, **options)

        setattr(module, name, counted)
        self.undo.callback(setattr, module, name, original)


# ---- scenarios: what is there before, what is done, what may be there after


def content(step):
    def write(directory):
        (directory / "model").mkdir()
        (directory / "model" / "model.safetensors").write_bytes(bytes([step]) * 5000)
        (directory / "optimizer.safetensors").write_bytes(bytes([step + 100]) * 3000)
        (directory / "state.json").write_text(f'{{"step": {step}}}')

    return write


def saved(directory, *steps, best=(), keep_last=2):
    store = CheckpointStore(directory, keep_last)
    for step in steps:
        store.save(step, content(step), best=step in best, info={"step": step})
    return store


def damage(store, step):
    (store.directory / f"step-{step}" / "state.json").write_bytes(b"")


def before_first(directory):
    return saved(directory)


def before_next(directory):
    return saved(directory, 1, 2, best={1})


def before_replacing_a_corrupt_one(directory):
    store = saved(directory, 1, 2, 3)
    damage(store, 3)
    return store


def before_saving_again(directory):
    return saved(directory, 1, 2, 3)


def save_3(store):
    store.save(3, content(3), best=True, info={"step": 3})


def discard(store):
    store.discard_after(2)


SCENARIOS = {
    "first": (before_first, save_3, {None, 3}),
    "next": (before_next, save_3, {2, 3}),
    "replace": (before_replacing_a_corrupt_one, save_3, {2, 3}),
    "again": (before_saving_again, save_3, {3}),
    "clean": (before_saving_again, CheckpointStore.clean, {3}),
    "discard": (lambda d: saved(d, 1, 2, 3, 4, best={4}, keep_last=9), discard, {2, 3, 4}),
}


def check_survivor(directory, allowed):
    """A valid checkpoint is found, holds what was saved, and the run can go on and clean up."""
    store = CheckpointStore(directory, 2)
    found = store.newest_intact()
    step = found[0] if found else None
    assert step in allowed
    if found:
        assert (found[1] / "model" / "model.safetensors").read_bytes() == bytes([step]) * 5000
        assert (found[1] / "state.json").read_text() == f'{{"step": {step}}}'
    store.clean()
    assert not [name for name in os.listdir(directory) if ".tmp-" in name] if directory.exists() else True
    for link in ("latest", "best"):
        assert not (directory / link).is_symlink() or (directory / link / "manifest.json").exists()
    save_3(store)
    assert store.verify(3) == []
    assert (directory / "best").resolve().name == "step-3"


def crash_at_every_operation(scenario, base):
    """Run in a process of its own: fork, die at operation k as in a power cut, look; for every k."""
    prepare, act, allowed = SCENARIOS[scenario]
    prepare(base / "before" / "checkpoints")
    for k in itertools.count():
        store = copied(base / "before", base / str(k))
        directory = store.directory
        old = {entry.stat().st_ino for entry in directory.rglob("*")} if directory.exists() else set()
        child = os.fork()
        if child == 0:
            wire = Tripwire(k, lambda: die_losing_what_was_not_flushed(directory, wire.flushed | old))  # noqa: B023
            with wire:
                act(store)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 99), code
        check_survivor(directory, allowed)
        shutil.rmtree(base / str(k))
        if code == 0:
            return k
    return None


def copied(before, base):
    if not before.exists():
        before.mkdir(parents=True)
    shutil.copytree(before, base, symlinks=True)
    return CheckpointStore(base / "checkpoints", 2)


def die_losing_what_was_not_flushed(directory, flushed):
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            status = os.stat(path, follow_symlinks=False)
            if not os.path.islink(path) and status.st_ino not in flushed:
                os.truncate(path, 0)
    os._exit(99)


@pytest.fixture
def memory_path(tmp_path):
    """A directory in memory where there is one: thousands of fsyncs to a real disk take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


# ---- crashes


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_every_operation_leaves_a_valid_checkpoint(memory_path, scenario):
    code = (
        "import sys; from pathlib import Path; from tests.faults.test_checkpoint_faults import *;"
        "print(crash_at_every_operation(sys.argv[1], Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, scenario, str(memory_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5  # operations there were


LOOP = """
import sys
from pathlib import Path
from trainway.checkpoint.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), 2)
store.clean()
found = store.newest_intact()
step = found[0] if found else 0
print(step, flush=True)
while True:
    step += 1
    payload = b"%d" % step * 100_000
    def write(directory):
        for part in "abc":
            (directory / part).write_bytes(payload)
    store.save(step, write, best=step % 5 == 0)
"""


def test_kill_9_in_the_middle_of_saves(tmp_path):
    rng = random.Random(0)
    reached = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        begun = int(process.stdout.readline())
        assert begun >= reached
        time.sleep(rng.uniform(0.02, 0.25))
        process.kill()
        process.communicate()
        found = CheckpointStore(tmp_path, 2).newest_intact()
        assert found is not None or begun == 0
        if found:
            reached, path, skipped = found
            assert skipped == []
            assert (path / "b").read_bytes() == b"%d" % reached * 100_000
    assert reached > 12


def test_the_order_of_a_save(tmp_path):
    store = saved(tmp_path, 1, 2)
    with Tripwire(10**9, None) as wire:
        save_3(store)
    order = [name for name in wire.names if name in ("fsync", "rename", "replace", "unlink")]
    # 1) three files, the manifest, two directories 2) publish, flush 3) two links, flushed 4) the old one: rename, remove
    assert order[:12] == [*["fsync"] * 6, "rename", "fsync", "replace", "fsync", "replace", "fsync"]
    assert order[12:14] == ["rename", "fsync"]
    assert set(order[14:]) == {"unlink"}


# ---- a disk that fails


def fail_with(number):
    def trip():
        raise OSError(number, os.strerror(number))

    return trip


@pytest.mark.parametrize("scenario", ["first", "next", "replace", "again"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_fault_at_every_operation(memory_path, scenario, lasting):
    prepare, act, allowed = SCENARIOS[scenario]
    prepare(memory_path / "before" / "checkpoints")
    faults = 0
    for k in itertools.count():
        store = copied(memory_path / "before", memory_path / str(k))
        directory = store.directory
        number = (errno.ENOSPC, errno.EROFS, errno.EIO)[k % 3]
        fault = None
        with Tripwire(k, fail_with(number), 10**9 if lasting else k) as wire:
            try:
                act(store)
            except EnvironmentFault as error:
                fault = error
        if fault:
            faults += 1
            assert str(directory) in fault.what
            assert os.strerror(number) in fault.why and fault.fix
            if not lasting:  # a disk that has failed for good cannot be tidied either
                assert not [path for path in directory.glob("*.tmp-*") if path.name.startswith("step-3")] or (
                    scenario == "replace"
                )
        check_survivor(directory, allowed)
        shutil.rmtree(memory_path / str(k))
        if k >= len(wire.names):
            break
    assert faults >= 5


def test_a_full_disk_names_path_space_and_cure(tmp_path):
    store = before_next(tmp_path / "c")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # really refused by the kernel, with EFBIG
    try:
        with pytest.raises(EnvironmentFault) as caught:
            store.save(3, content(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-3" in caught.value.what and str(tmp_path) in caught.value.what
    assert "File too large" in caught.value.why and "GiB free" in caught.value.why
    assert "start the same command again" in caught.value.fix
    assert sorted(os.listdir(tmp_path / "c")) == ["best", "latest", "step-1", "step-2"]
    assert store.verify(1) == store.verify(2) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory(tmp_path):
    store = before_next(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentFault, match="could not be written"):
            save_3(store)
    finally:
        tmp_path.chmod(0o700)
    check_survivor(tmp_path, {2})


def test_a_reader_that_holds_an_old_checkpoint_does_not_end_the_run(tmp_path, monkeypatch):
    store = saved(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: fail_with(errno.EBUSY)())
    save_3(store)
    assert store.steps() == [2, 3]
    monkeypatch.undo()
    assert len(store.clean()) == 1


def test_a_fault_while_looking_for_the_best_does_not_prune_it(tmp_path, monkeypatch):
    store = saved(tmp_path, 1, 2, best={1})
    monkeypatch.setattr(os, "readlink", lambda *_, **__: fail_with(errno.EIO)())
    with pytest.raises(EnvironmentFault):
        store.save(3, content(3))
    assert store.steps() == [1, 2, 3]


# ---- damage


FILES = ["model/model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with path.open("ab") as file:
        file.write(b" ")


def link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "word"),
    [(flip, "altered"), (truncate, "truncated"), (empty, "empty"), (grow, "grown"), (os.unlink, "missing"),
     (link, "not a plain file")],
)  # fmt: skip
def test_damage_is_found_named_and_the_one_before_used(tmp_path, name, harm, word):
    store = saved(tmp_path, 1, 2)
    harm(tmp_path / "step-2" / name)
    problems = [problem for problem in store.verify(2) if name in problem]
    assert len(problems) == 1
    assert (word if name != "manifest.json" or harm in (os.unlink, link) else "altered") in problems[0]
    step, path, skipped = store.newest_intact()
    assert (step, path) == (1, tmp_path / "step-1")
    assert skipped == [(2, store.verify(2))]
    with pytest.raises(DataError, match="step-2"):
        store.resolve(2)


@pytest.mark.parametrize("extra", ["extra.bin", "model/extra.bin", "deep/er/manifest.json"])
def test_an_extra_file_is_found(tmp_path, extra):
    store = saved(tmp_path, 1)
    (tmp_path / "step-1" / extra).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "step-1" / extra).write_text("x")
    assert store.verify(1) == [f"{extra}: extra: not in the manifest"]


def test_every_single_bit_of_the_manifest_counts(memory_path):
    saved(memory_path, 1)
    path = memory_path / "step-1" / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            with pytest.raises(DataError):
                read_manifest(path.parent)


def test_a_directory_renamed_to_another_step(tmp_path):
    store = saved(tmp_path, 1)
    (tmp_path / "step-1").rename(tmp_path / "step-9")
    assert store.verify(9) == ["step-9/manifest.json: belongs to step 1"]


def test_all_corrupt_is_refused(tmp_path):
    store = saved(tmp_path, 1, 2)
    damage(store, 1)
    damage(store, 2)
    with pytest.raises(DataError, match=r"no checkpoint .* is intact") as caught:
        store.newest_intact()
    assert "step 2: state.json: empty" in caught.value.why and "step 1:" in caught.value.why


@pytest.mark.parametrize("target", [None, "step-77", "../elsewhere", "latest"])
def test_nothing_depends_on_the_latest_link(tmp_path, target):
    store = saved(tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if target:
        (tmp_path / "latest").symlink_to(target)
    assert store.newest_intact()[0] == 2
    assert store.resolve("latest").name == "step-2"
    store.describe()
    store.clean()
    assert os.readlink(tmp_path / "latest") == "step-2"


# ---- manifests made by an enemy


def forge(directory, **changes):
    """A manifest whose checksum is right."""

    body = {**json.loads((directory / "manifest.json").read_text()), **changes}
    body.pop("checksum")
    (directory / "manifest.json").write_text(sealed_json(body))


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "./state.json",
        "a//b",
        "",
        ".",
        "..",
        "a\0b",
        "manifest.json",
    ],
)
def test_paths_that_leave_the_checkpoint_are_refused(tmp_path, name):
    store = saved(tmp_path / "c", 1)
    (tmp_path / "c" / "secret").write_text("")
    forge(tmp_path / "c" / "step-1", files=[{"path": name, "size": 0, "xxh3_128": "0" * 32}])
    (problem,) = store.verify(1)
    assert "unsafe path" in problem


def test_links_and_devices_are_refused_though_their_content_would_match(tmp_path):
    store = saved(tmp_path / "c", 1)
    step = tmp_path / "c" / "step-1"
    shutil.move(step / "model", tmp_path / "outside")
    (step / "model").symlink_to(tmp_path / "outside")
    (step / "state.json").unlink()
    os.mkfifo(step / "state.json")
    problems = store.verify(1)
    assert "state.json: not a plain file" in problems
    assert "model/model.safetensors: missing" in problems and any(
        p.startswith("model: extra") for p in problems
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"files": None},
        {"files": [1]},
        {"files": [{"path": "a"}]},
        {"files": [{"path": 1, "size": 0, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a", "size": -1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a", "size": True, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a", "size": 0, "xxh3_128": "x"}]},
        {"files": [{"path": "a", "size": 0, "xxh3_128": "0" * 32}] * 2},
        {"info": []},
        {"best": 1},
        {"step": "1"},
        {"more": 1},
    ],
)
def test_malformed_manifests_are_refused(tmp_path, changes):
    store = saved(tmp_path, 1)
    forge(tmp_path / "step-1", **changes)
    (problem,) = store.verify(1)
    assert problem.startswith("step-1/manifest.json: ")
    with pytest.raises(DataError):
        store.info(1)


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"[" * 100_000, b"null", b'{"a": 1}'])
def test_manifests_that_are_none(tmp_path, text):
    store = saved(tmp_path, 1)
    (tmp_path / "step-1" / "manifest.json").write_bytes(text)
    assert len(store.verify(1)) == 1
