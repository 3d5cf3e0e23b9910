"""The sharder under faults: killed, crashed at every file operation, interrupted, on a full disk, on bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.fakes_hub import FakeHub, serve
from trainway.cli.app import main
from trainway.config.schema import DataConfig, RunConfig, ShardConfig, TokenizerConfig
from trainway.data import shard_pour, shard_writer
from trainway.data.prepare import prepare
from trainway.data.shard import ShardReport, shard
from trainway.data.sources import find_sources
from trainway.errors import DataError, EnvironmentFault

STYLES = {
    "text": [],
    "gzip": ["--gzip"],
    "jsonl": ["--format", "jsonl"],
    "split": ["--mode", "split", "--val-ratio", "0.05", "--gzip"],
}


def write_source(path: Path, documents: int, *, bad_every: int = 0) -> Path:
    rng = random.Random(5)
    with path.open("w") as file:
        for number in range(documents):
            words = " ".join(
                rng.choice(["alpha", "beta\n", "γάμμα", "delta"]) for _ in range(rng.randrange(1, 60))
            )
            file.write(json.dumps({"text": f"{number} {words}"}) + "\n")
            if bad_every and number % bad_every == 0:
                file.write('{"text": ""}\n')
    return path


def contents(*folders: Path) -> dict[str, bytes]:
    """Everything that must be identical: the shards, the manifests, the list of malformed records."""
    return {
        f"{number}/{path.name}": path.read_bytes()
        for number, folder in enumerate(folders)
        for path in folder.iterdir()
        if path.name not in {".lock", ".sources.json"}
    }


def both(out: Path) -> list[Path]:
    return [folder for folder in (out, out.with_name(f"{out.name}-val")) if folder.exists()]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "in.jsonl", 9000, bad_every=1000)


def command(source: Path, out: Path, *options: object) -> list[str]:
    words = ["data", "shard", "--input", source, "--out", out, "--lines-per-shard", 150, *options]
    return [*map(str, words), "--on-bad-record", "quarantine"]


def start(source: Path, out: Path, *options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainway", *command(source, out, *options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(source: Path, out: Path, *options: object) -> None:
    """The same command in this process, to its end."""
    assert main(command(source, out, *options)) == 0


def shards_listed(out: Path) -> int:
    try:
        return len(json.loads((out / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def wait_for_shards(process: subprocess.Popen[str], out: Path, count: int) -> None:
    while process.poll() is None and shards_listed(out) < count:
        time.sleep(0.002)


def kill_and_resume(large: Path, folder: Path, style: str, kills: int, seed: int) -> None:
    options = STYLES[style]
    finish(large, folder / "straight", *options)
    rng = random.Random(seed)
    killed = 0
    for at in sorted(rng.sample(range(50), kills)):
        process = start(large, folder / "out", *options)
        wait_for_shards(process, folder / "out", at)
        time.sleep(rng.random() * 0.02)
        killed += process.poll() is None
        process.kill()
        process.communicate()
        for part in both(folder / "out"):
            if shards_listed(part):  # what is there can be used at any time
                find_sources([str(part)], DataConfig(), setting="data.train")
    assert killed >= kills - 1
    finish(large, folder / "out", *options)
    assert contents(*both(folder / "out")) == contents(*both(folder / "straight"))


@pytest.mark.parametrize("style", STYLES)
def test_killed_three_times_the_output_is_byte_identical(large: Path, tmp_path: Path, style: str) -> None:
    kill_and_resume(large, tmp_path, style, kills=3, seed=len(style))


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_killed_ten_times_the_output_is_byte_identical(large: Path, tmp_path: Path, style: str) -> None:
    kill_and_resume(large, tmp_path, style, kills=10, seed=40 + len(style))


class Crash(BaseException):
    """Stands for the power going: nothing after it runs."""


class Crasher:
    """Counts the file operations of the sharder and crashes at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at = -1
        self.dead = False
        for name in ("replace", "truncate"):
            patch.setattr(os, name, self._wrap(getattr(os, name)))
        patch.setattr(
            os, "fsync", self._wrap(lambda descriptor: None)
        )  # no power goes here, and it takes long
        patch.setattr(Path, "unlink", self._wrap(Path.unlink))
        patch.setattr(shard_writer.ShardWriter, "_write", self._wrap(shard_writer.ShardWriter._write))
        # a process that is gone tidies nothing up
        tidy = shard_pour.restore
        patch.setattr(shard_pour, "restore", lambda sink: None if self.dead else tidy(sink))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if not self.dead:
                self.count += 1
                if self.count == self.at:
                    self.dead = True
            if self.dead:
                raise Crash
            return function(*arguments, **named)

        return wrapped

    def run(self, at: int, work: Callable[[], object]) -> bool:
        """Whether the work crashed at that operation; False: it has fewer of them."""
        self.count, self.at, self.dead = 0, at, False
        try:
            work()
        except Crash:
            return True
        finally:
            self.dead = False
            self.at = -1
        return False


@pytest.mark.parametrize(
    "settings", [{"mode": "split", "val_ratio": 0.3, "gzip": True}, {}], ids=["split", "prod"]
)
def test_a_crash_at_every_file_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    source = write_source(tmp_path / "in.jsonl", 24, bad_every=9)

    def work(name: str) -> ShardReport:
        values = {"inputs": (str(source),), "out": str(tmp_path / name), "lines_per_shard": 5}
        return shard(ShardConfig.model_validate({**values, **settings, "on_bad_record": "quarantine"}))

    monkeypatch.setattr(shard_writer, "DRAIN_BYTES", 300)
    work("straight")
    wanted = contents(*both(tmp_path / "straight"))
    crasher = Crasher(monkeypatch)
    rng = random.Random(1)
    at = 0
    while crasher.run(at := at + 1, lambda: work(f"out{at}")):
        out = tmp_path / f"out{at}"
        crasher.run(rng.randrange(1, 25), lambda: work(f"out{at}"))  # and once more while it goes on
        for part in both(out):
            if shards_listed(part):
                find_sources([str(part)], DataConfig(), setting="data.train")
        work(f"out{at}")
        assert contents(*both(out)) == wanted, at
    assert at > 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_75_and_goes_on(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(large, tmp_path / "out", *STYLES["split"])
    wait_for_shards(process, tmp_path / "out", 5)
    process.send_signal(number)
    _, log = process.communicate()
    assert process.returncode == 75, log
    assert "complete shards are in" in log.splitlines()[-1] and "run the same command again" in log
    assert "Traceback" not in log
    count = shards_listed(tmp_path / "out")
    assert count >= 5
    visible = [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert len(visible) == count + 2  # and the manifest, and the malformed records
    done = run_cli(*command(large, tmp_path / "out", *STYLES["split"], "--json"))
    assert json.loads(done.stdout)["resumed_lines"] >= count * 150
    finish(large, tmp_path / "straight", *STYLES["split"])
    assert contents(*both(tmp_path / "out")) == contents(*both(tmp_path / "straight"))


def test_a_second_sharder_is_refused_and_a_dead_ones_lock_is_free(large: Path, tmp_path: Path) -> None:
    first = start(large, tmp_path / "out")
    wait_for_shards(first, tmp_path / "out", 1)
    first.send_signal(signal.SIGSTOP)
    second = start(large, tmp_path / "out")
    _, log = second.communicate()
    assert second.returncode == 4
    assert f"process {first.pid} on host" in log and "is in use" in log
    # nor may it take the directory for its validation shards
    third = start(large, tmp_path / "other", *STYLES["split"], "--val-out", str(tmp_path / "out"))
    third.communicate()
    assert third.returncode == 4
    first.kill()
    first.communicate()
    finish(large, tmp_path / "out")


@pytest.mark.parametrize("style", ["text", "split"])
def test_a_full_disk_in_mid_shard(small_disk: Path, large: Path, tmp_path: Path, style: str) -> None:
    options = ["--format", "jsonl", *(["--mode", "split", "--val-ratio", "0.3"] if style == "split" else [])]
    process = start(large, small_disk / "out", *options)
    _, log = process.communicate()
    assert process.returncode == 4, log
    assert "No space left" in log and "free some space" in log
    count = shards_listed(small_disk / "out")
    assert count > 2
    resume = json.loads((small_disk / "out/manifest.json").read_text())["resume"]
    for name, part in zip(("train", "validation"), both(small_disk / "out"), strict=False):
        # no more is left of the shard in hand than what the manifest counts on
        left = [path.stat().st_size for path in part.iterdir() if path.suffix == ".partial"]
        assert left == [size for size in [resume[name]["tail"]["bytes"]] if size]
        assert not [path for path in part.iterdir() if ".tmp-" in path.name]
        names = {path.name for path in part.glob("shard-*")}
        assert names == {
            entry["file"] for entry in json.loads((part / "manifest.json").read_text())["shards"]
        }
        find_sources([str(part)], DataConfig(), setting="data.train")

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    finish(large, small_disk / "out", *options)
    finish(large, tmp_path / "straight", *options)
    assert contents(*both(small_disk / "out")) == contents(*both(tmp_path / "straight"))


def sharded(folder: Path, **settings: Any) -> Path:
    source = write_source(folder / "in.jsonl", 60)
    values = {"inputs": (str(source),), "out": str(folder / "out"), "lines_per_shard": 20}
    return shard(ShardConfig.model_validate({**values, **settings})).out


def prepared(folder: Path, cache: Path) -> int:
    data = DataConfig(train=(str(folder),), val_ratio=0.1, store_dir=str(cache))
    found = prepare(RunConfig(data=data, tokenizer=TokenizerConfig(vocab_size=300)))
    return int(found.manifest.splits["train"]["documents"] + found.manifest.splits["val"]["documents"])


@pytest.mark.parametrize(
    "settings", [{}, {"gzip": True}, {"format": "jsonl"}, {"format": "jsonl", "gzip": True}]
)
def test_prepare_takes_the_shards(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert prepared(sharded(tmp_path, **settings), tmp_path / "cache") == 60


def flip(out: Path) -> None:
    path = out / "shard-00001.txt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(out: Path) -> None:
    os.truncate(out / "shard-00001.txt", 100)


def swap(out: Path) -> None:
    one, two = out / "shard-00001.txt", out / "shard-00002.txt"
    one.rename(out / "held")
    two.rename(one)
    (out / "held").rename(two)


def duplicate(out: Path) -> None:
    (out / "shard-00003.txt").write_bytes((out / "shard-00001.txt").read_bytes())


def list_twice(out: Path) -> None:
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"].insert(1, manifest["shards"][1])
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "shard-00001.txt: the shard was altered"),
        (cut, "shard-00001.txt: the shard was altered"),
        (lambda out: (out / "shard-00001.txt").unlink(), "shard-00001.txt: the shard is missing"),
        (lambda out: (out / "shard-00001.txt").write_bytes(b""), "it is empty"),
        (swap, "shard-00001.txt: the shard was altered"),
        (duplicate, "shard-00003.txt: an unknown shard"),
        (list_twice, "shard-00001.txt is listed twice"),
    ],
    ids=["flipped", "truncated", "deleted", "emptied", "reordered", "duplicated", "listed twice"],
)
def test_a_damaged_shard_is_caught_before_training(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    out = sharded(tmp_path)
    damage(out)
    with pytest.raises(DataError) as error:
        prepared(out, tmp_path / "cache")
    assert message in str(error.value)
    with pytest.raises(DataError) as error:  # the sharder, called again, says the same
        sharded(tmp_path)
    assert message in str(error.value)


def test_bad_input_is_set_aside_and_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "first after a byte order mark"}\r\n'
        b'{"text": "caf\xff"}\r\n'
        b'{"text": "nul \\u0000 within"}\n'
        b'{"text": "lone \\ud800 surrogate"}\n'
        b'{"text": "crlf\\r\\nwithin"}\n'
        + b"[" * 100_000 + b"\n"
        b'{"text": ["list"]}\n'
        b'{"text": "last without end of line"}'
    )  # fmt: skip
    (raw / "b.txt").write_bytes(b"good\r\n\r\n\xc3\x28 bad\r\nnul \x00\nlast\r\n")
    done = run_cli("data", "shard", "--input", raw, "--out", tmp_path / "out", "--text-unit", "line",
                   "--on-bad-record", "quarantine", "--json")  # fmt: skip
    assert json.loads(done.stdout)["quarantined"] == 7
    shown = (tmp_path / "out/shard-00000.txt").read_bytes()
    assert shown == (b"first after a byte order mark\ncrlf within\nlast without end of line\ngood\nlast\n")
    bad = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(Path(item["source"]).name, item["line"]) for item in bad] == [
        ("a.jsonl", 2), ("a.jsonl", 3), ("a.jsonl", 4), ("a.jsonl", 6), ("a.jsonl", 7), ("b.txt", 3), ("b.txt", 4),
    ]  # fmt: skip
    assert [word in item["reason"] for item, word in zip(bad, (
        "UTF-8 at byte 13", "NUL", "surrogate U+D800", "nested", "a list", "UTF-8", "NUL"), strict=True)] == [True] * 7  # fmt: skip


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    done = run_cli("data", "shard", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", check=3)
    assert f"{tmp_path / 'in.jsonl'}: the file is empty" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_line_of_100_mb_is_set_aside(tmp_path: Path) -> None:
    with (tmp_path / "in.jsonl").open("w") as file:
        file.write('{"text": "a"}\n{"text": "' + "x" * 100_000_000 + '"}\n{"text": "b"}\n')
    done = run_cli("data", "shard", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out",
                   "--on-bad-record", "quarantine", "--json")  # fmt: skip
    assert json.loads(done.stdout)["quarantined"] == 1
    assert (tmp_path / "out/shard-00000.txt").read_text() == "a\nb\n"
    assert "longer than max_document_mib" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    write_source(tmp_path / "in.jsonl", 3)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        shard(ShardConfig(inputs=(str(tmp_path / "in.jsonl"),), out=str(tmp_path / "file/out")))


def hub_rows(first: int, count: int) -> bytes:
    return "".join(json.dumps({"text": f"row {i} of the hub\nsecond", "id": i}) + "\n" for i in range(first, first + count)).encode()  # fmt: skip


def hub_environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """Of a process whose only Hub is ours."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HUGGINGFACEHUB_API_TOKEN": "hf_canary",
        "HF_TOKEN": "",
    }


def test_a_hub_stream_goes_on_at_its_commit(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    hub = FakeHub()
    files = {f"train-{n}.jsonl": hub_rows(1500 * n, 1500) for n in range(3)}
    hub.datasets["me/set"] = {"a" * 40: files}
    hub.gated, hub.token = {"me/set"}, "hf_canary"
    words = ["--dataset", "me/set", "--lines-per-shard", "50", "--gzip"]
    with serve(hub):
        environ = hub_environment(hub, tmp_path / "home")
        process = subprocess.Popen(
            [sys.executable, "-m", "trainway", "data", "shard", *words, "--out", str(tmp_path / "out")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ},
        )  # fmt: skip
        wait_for_shards(process, tmp_path / "out", 40)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate()
        assert process.returncode == 75, log
        # the dataset moves on meanwhile: the run stays with the commit that it began with
        hub.datasets["me/set"]["b" * 40] = {"train-0.jsonl": hub_rows(90_000, 10)}
        hub.requests.clear()
        done = run_cli("data", "shard", *words, "--out", tmp_path / "out", "--json", **environ)
        assert json.loads(done.stdout)["resumed_lines"] >= 40 * 50
        assert json.loads(done.stdout)["train"]["lines"] == 4500
        first_opened = next(
            path for path, _ in hub.requests if "/resolve/" in path and path.endswith(".jsonl")
        )
        assert "train-0" in first_opened  # for the columns
        hub.requests.clear()
        assert (
            main(["data", "shard", *words, "--out", str(tmp_path / "out")]) == 0
        )  # verified without the Hub
        assert not hub.requests
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    words = [word for name in files for word in ("--input", str(tmp_path / name))]
    straight = [
        "data",
        "shard",
        *words,
        "--lines-per-shard",
        "50",
        "--gzip",
        "--out",
        str(tmp_path / "straight"),
    ]
    assert main(straight) == 0
    found, wanted = contents(tmp_path / "out"), contents(tmp_path / "straight")
    assert {name for name in found if found[name] != wanted.get(name)} == {
        "0/manifest.json"
    }  # the source alone
    assert not any(b"hf_canary" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_hub_that_refuses_lacks_or_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    hub = FakeHub()
    hub.datasets["me/set"] = {"a" * 40: {"train.jsonl": hub_rows(0, 3)}}
    hub.gated, hub.token = {"me/set"}, "hf_other"
    with serve(hub):
        environ = hub_environment(hub, tmp_path / "home")
        for words, code, message in (
            (["--dataset", "me/set"], 4, "the Hub refuses access to me/set"),
            (["--dataset", "me/none"], 3, "the dataset me/none was not found"),
        ):
            done = run_cli("data", "shard", *words, "--out", tmp_path / "out", check=code, **environ)
            assert message in done.stderr and "HUGGINGFACEHUB_API_TOKEN" in done.stderr
            assert "Traceback" not in done.stderr and "hf_canary" not in done.stderr
        words = ["--dataset", "me/set", "--out", tmp_path / "out"]
        done = run_cli("data", "shard", *words, check=4, **environ, HF_HUB_OFFLINE="1")
        assert "me/set cannot be reached" in done.stderr and "HF_HUB_OFFLINE" in done.stderr
