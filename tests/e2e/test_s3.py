"""Copies against a real S3 server behind a network that fails: byte for byte, after faults and kills at any instant."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import kill_all, launch, run_cli, stream, tiny, wait_for, write_config
from tests.copied_runs import ToyRun, same_run
from tests.faulty_proxy import Fault, Faults, faulty_proxy
from trainway.errors import DataError, EnvironmentFault
from trainway.storage.address import parse_address
from trainway.storage.restore import find_run, restore
from trainway.storage.retry import Backoff
from trainway.storage.s3 import S3Store
from trainway.storage.store import Content
from trainway.storage.sync import Syncer, copy_run
from trainway.storage.transfer import copy_tree

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")

CANARY = "canary-7f3a-not-a-secret-of-anyone"
QUICK = Backoff(attempts=4, base_s=0.01, cap_s=0.02)
BLOCK = 5 << 20
"""The least that S3 takes as a part."""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield running.get_host_and_port()
    running.stop()


@pytest.fixture
def faults(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy to the server; the environment leads there, and a bucket is new and empty."""
    with faulty_proxy(*server) as found:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = S3Store(parse_address("s3://bkt"), QUICK)
        store._ask("create_bucket")
        store.delete(store.entries())
        store.drop_unfinished("")
        found.requests.clear()
        yield found


def store_at(prefix: str) -> S3Store:
    return S3Store(parse_address(f"s3://bkt/{prefix}"), QUICK, block_bytes=BLOCK)


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize(
    "fault",
    [
        "503",
        "lost answer",
        "wrong etag",
        *(pytest.param(it, marks=pytest.mark.slow) for it in ("500", "429", "cut request")),
    ],
)
def test_writing_small_and_large_objects_survives(faults: Faults, tmp_path: Path, fault: Fault) -> None:
    data, store = some_bytes(2 * BLOCK + 77), store_at("w")
    (tmp_path / "big").write_bytes(data)
    faults.plan += [
        ("PUT", "/w/small", fault, 0),
        ("PUT", "partNumber=2", fault, 0),
        ("POST", "uploadId=", fault, 0),
    ]
    small = store.put("small", Content.of_bytes(b"hello"))
    big = store.put("big", Content.of_file(tmp_path / "big"))
    assert faults.met.count(fault) == 3
    assert store.entries() == {"small": small, "big": big}
    store.get("big", big, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert store.matches("big", big, tmp_path / "back") is True
    assert store._unfinished("") == [], "nothing is left that no listing shows and that costs"


@pytest.mark.parametrize("fault", ["500", "429", "cut request", "cut answer", "wrong etag", "short"])
def test_reading_survives(faults: Faults, tmp_path: Path, fault: Fault) -> None:
    data, store = some_bytes(2 * BLOCK + 9), store_at("r")
    entry = store.put("big", Content.of_bytes(data))
    faults.plan += [("GET", "/r/big", fault, 0), ("GET", "/r/big", fault, 1)]
    store.get("big", entry, tmp_path / "back")
    assert faults.met == [fault, fault]
    assert (tmp_path / "back").read_bytes() == data


def test_bytes_altered_on_the_way_are_never_taken(faults: Faults, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x").write_bytes(b"right")
    copy_tree(tmp_path / "tree", "s3://bkt/t", backoff=QUICK)
    faults.plan += [("GET", "/t/x", "flipped", 0)]
    copy_tree("s3://bkt/t", tmp_path / "back", backoff=QUICK)
    assert (tmp_path / "back" / "x").read_bytes() == b"right"
    faults.plan += [("GET", "/t/x", "flipped", 0)] * 9
    with pytest.raises(DataError, match="altered"):
        copy_tree("s3://bkt/t", tmp_path / "more", backoff=QUICK)
    assert not (tmp_path / "more" / "x").exists()


def test_a_server_that_stays_away_is_given_up_in_bounded_time_and_without_a_secret(
    faults: Faults, tmp_path: Path
) -> None:
    faults.plan += [("PUT", "/w/x", "500", 0)] * 99
    with pytest.raises(EnvironmentFault, match="failed 4 times") as caught:
        store_at("w").put("x", Content.of_bytes(b"1"))
    assert len(faults.met) == 4
    assert CANARY not in str(caught.value)
    assert "tester" not in str(caught.value)


def test_an_upload_in_parts_that_was_cut_off_is_taken_over(faults: Faults, tmp_path: Path) -> None:
    data, store = some_bytes(3 * BLOCK), store_at("p")
    (tmp_path / "big").write_bytes(data)
    faults.plan += [("PUT", "partNumber=3", "500", 0)] * 4
    with pytest.raises(EnvironmentFault):
        store.put("big", Content.of_file(tmp_path / "big"))
    faults.requests.clear()
    entry = store.put("big", Content.of_file(tmp_path / "big"))
    assert [line for line in faults.requests if line.startswith("PUT")] == [
        line for line in faults.requests if "partNumber=3" in line
    ]
    store.get("big", entry, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    # another content under the name takes over nothing of it
    faults.plan += [("PUT", "partNumber=3", "500", 0)] * 4
    with pytest.raises(EnvironmentFault):
        store.put("other", Content.of_file(tmp_path / "big"))
    other = some_bytes(3 * BLOCK, seed=2)
    entry = store.put("other", Content.of_bytes(other))
    store.get("other", entry, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == other


def test_memory_stays_flat(faults: Faults, tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(60 * BLOCK)
    # the server of the test is another process' worth of memory in this one: what is counted is held blocks
    alive = peak = 0
    lock = threading.Lock()
    store = store_at("m")

    def counted(name: str, upload: str, number: int, data: bytes) -> str:
        nonlocal alive, peak
        with lock:
            alive += 1
            peak = max(peak, alive)
        with lock:
            alive -= 1
        return ""

    store._send_part = counted  # type: ignore[method-assign]
    store._begin = lambda name: ("id", {})  # type: ignore[method-assign]
    store._finish = lambda *arguments: ""  # type: ignore[method-assign]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.put("big", Content.of_file(path))
    assert peak <= 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * BLOCK / 1024


def test_a_run_is_copied_through_faults_and_restored(faults: Faults, tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10, best=True)
    run.train(20)
    faults.plan += [
        ("PUT", "/metrics.jsonl", "cut request", 0), ("PUT", "manifest.json", "lost answer", 0),
        ("PUT", ".trainway.json", "500", 1), ("GET", "list-type", "429", 0),
    ]  # fmt: skip
    assert copy_run(run.dir.path, "s3://bkt/run", backoff=QUICK) == 20
    assert not faults.plan
    assert find_run("s3://bkt/run", backoff=QUICK) == 20
    faults.plan += [("GET", "model.safetensors", "cut answer", 0), ("GET", "optimizer", "flipped", 0)]
    assert restore("s3://bkt/run", tmp_path / "back", backoff=QUICK).steps == (10, 20)
    assert not faults.plan
    same_run(run.dir.path, tmp_path / "back")


def follow(run: Path, *, every: float = 0.2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainway.storage", str(run), "s3://bkt/run", "--every", str(every)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("method", "part", "spared"),
    [
        pytest.param("PUT", "partNumber=2", 0, marks=pytest.mark.slow),
        ("PUT", "step-20/optimizer", 0),
        # these two are killed at in tests/unit/storage/test_sync.py too, by an exception
        pytest.param("PUT", "step-20/manifest.json", 0, marks=pytest.mark.slow),
        pytest.param("PUT", "checkpoints/latest", 1, marks=pytest.mark.slow),
    ],
)
def test_kill_9_in_the_middle_and_once_more(
    faults: Faults, tmp_path: Path, method: str, part: str, spared: int
) -> None:
    run = ToyRun(tmp_path / "run", size=5 if part != "partNumber=2" else 2_000_000)
    run.train(10)
    copy_run(run.dir.path, "s3://bkt/run", backoff=QUICK)
    run.train(20)
    faults.plan += [(method, part, "hold", 0)]
    process = follow(run.dir.path)
    wait_for(faults.held.is_set, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert find_run("s3://bkt/run", backoff=QUICK) == (20 if "latest" in part else 10)
    assert restore("s3://bkt/run", tmp_path / "back", backoff=QUICK).skipped == ()
    assert Syncer(run.dir.path, "s3://bkt/run", backoff=QUICK).copy_now() == 20
    restore("s3://bkt/run", tmp_path / "again", backoff=QUICK)
    run.store._retire(10)
    same_run(run.dir.path, tmp_path / "again")
    assert store_at("run")._unfinished("") == []


def test_sigterm_is_one_last_pass_and_nothing_told(faults: Faults, tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "run")
    run.train(10)
    process = follow(run.dir.path, every=3600)
    state = run.dir.path / "sync.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["state"] == "waiting", process)
    run.train(20)
    with run.dir.log.open("a") as file:
        file.write("the last line\n")
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert find_run("s3://bkt/run", backoff=QUICK) == 20
    assert store_at("run").read("log.txt", 99) == b"the last line\n"
    assert json.loads(state.read_text())["state"] == "done"
    copied = b"".join(path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file())
    assert CANARY.encode() not in said + copied


@pytest.mark.slow
def test_prepare_reads_from_the_bucket_once(
    faults: Faults, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    store = store_at("data")
    store.put("train/a.jsonl", Content.of_bytes(b"".join(lines[:300])))
    store.put("train/b.jsonl", Content.of_bytes(b"".join(lines[300:])))
    store.put("train/notes.xyz", Content.of_bytes(b"of no known kind"))
    config = tiny(corpus, tmp_path / "cache", tmp_path / "run")
    config["data"]["train"] = ["s3://bkt/data/train/*.jsonl"]  # type: ignore[index]
    path = write_config(tmp_path / "tiny.yaml", config)
    faults.plan += [("GET", "/train/b.jsonl", "cut answer", 0)]
    run_cli("prepare", path)
    assert not faults.plan
    (origin,) = (tmp_path / "cache" / ".remote").glob("*/origin.json")
    found = json.loads(origin.read_text())
    assert [file["name"] for file in found["files"]] == ["a.jsonl", "b.jsonl"]
    fetched = b"".join((origin.parent / "files" / name).read_bytes() for name in ("a.jsonl", "b.jsonl"))
    assert fetched == corpus.read_bytes()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is asked again
    assert "cached" in run_cli("prepare", path, "--json").stdout


@pytest.mark.slow
def test_a_run_restored_elsewhere_goes_on_as_if_never_stopped(
    faults: Faults, corpus: Path, store_dir: Path, tmp_path: Path
) -> None:
    run_cli("train", write_config(tmp_path / "whole.yaml", tiny(corpus, store_dir, tmp_path / "whole")))
    run = tmp_path / "run"
    process = launch(write_config(tmp_path / "run.yaml", tiny(corpus, store_dir, run)))
    wait_for((run / "checkpoints" / "step-10").exists, process)
    kill_all(process)
    faults.plan += [
        ("PUT", "model.safetensors", "cut request", 0),
        ("GET", "model.safetensors", "cut answer", 0),
    ]
    run_cli("sync", run, "s3://bkt/runs/one")
    shutil.rmtree(run)
    done = run_cli("sync", tmp_path / "elsewhere", "s3://bkt/runs/one", "--restore")
    assert f"{tmp_path / 'elsewhere'} is at step 10" in done.stdout
    assert not faults.plan
    again = tiny(corpus, store_dir, tmp_path / "elsewhere")
    run_cli("train", write_config(tmp_path / "again.yaml", again), "--resume", "auto", "--allow-changes")
    assert stream(tmp_path / "elsewhere") == stream(tmp_path / "whole")
