"""What the board reads from disk: only plain files below its directory, and of a growing file only what is new."""

from __future__ import annotations

import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from tests.board_material import PAYLOADS, grow, held, make_job, make_run, record
from trainway.board.charts import MOST_POINTS, ChartStore
from trainway.board.masking import Masker
from trainway.board.place import Place, search
from trainway.board.runs import METRICS_TAIL
from trainway.board.settings import read_settings
from trainway.board.tail import MOST_BYTES, Tail
from trainway.board.watch import Board
from trainway.errors import ConfigError
from trainway.report.series import RunSeries

CANARY = "hf_CanaryCanaryCanary123"


class Clock:
    """Time that passes when it is told to, for the board's word on what stands still."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _looks_at_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainway.board.watch.FRESH_S", 0.0)
    monkeypatch.setattr("trainway.board.watch.SEARCH_S", 0.0)
    monkeypatch.setattr("trainway.board.watch.SEARCH_SHARE", 0)
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))


def rows(board: Board, since: str = "") -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in board.runs(since)[1]["runs"]}


# ---- the directory


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        Place(tmp_path / "nothing")


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    make_run(outside / "run")
    inside = make_run(root / "inside", steps=3)
    (root / "linked").symlink_to(outside / "run")
    (root / "plain").mkdir()
    (root / "plain" / "metrics.jsonl").symlink_to(outside / "run" / "metrics.jsonl")
    (root / "plain" / "log.txt").symlink_to(outside / "run" / "log.txt")
    os.mkfifo(root / "plain" / "status.json")
    os.mkfifo(root / "plain" / "samples.jsonl")
    place = Place(root)
    assert search(place).runs == [inside.path, root / "plain"]
    for name in ("metrics.jsonl", "log.txt", "status.json"):
        with pytest.raises(OSError), place.open(root / "plain" / name):
            pass
    with pytest.raises(OSError), place.open(root / "linked" / "log.txt"):
        pass
    with place.open(inside.metrics) as file:
        assert file.readline().startswith(b'{"step": 1,')
    row = rows(Board(root))["plain"]
    assert row["step"] == 0 and row["figures"] == {} and row["state"] == "new"
    assert ChartStore(place).read("x", root / "plain" / "metrics.jsonl")[1]["curves"] == {}


def test_a_root_that_is_itself_reached_by_a_link_is_fine(tmp_path: Path) -> None:
    make_run(tmp_path / "real" / "run", steps=3)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert list(rows(Board(tmp_path / "link"))) == ["run"]


def test_a_run_directory_itself_may_be_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=3)
    make_run(tmp_path / "set" / "sweep" / "run", steps=3)
    make_run(tmp_path / "set" / "other", steps=3)
    assert rows(Board(tmp_path / "run"))["run"]["folder"] == ""
    assert {name: row["folder"] for name, row in rows(Board(tmp_path / "set")).items()} == {
        "run": "sweep",
        "other": "",
    }


def test_jobs_are_no_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", steps=3)
    job = make_job(tmp_path, "one", "runs/one")
    found = search(Place(tmp_path))
    assert (found.runs, found.jobs) == ([tmp_path / "runs" / "one"], [job.path])


def test_a_search_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdef":
        (tmp_path / name).mkdir()
    monkeypatch.setattr("trainway.board.place.MOST_ENTRIES", 4)
    assert not search(Place(tmp_path)).complete


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read_hides_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "open", steps=3)
    shut = make_run(tmp_path / "shut", steps=3)
    shut.path.chmod(0)
    try:
        assert list(rows(Board(tmp_path))) == ["open"]
    finally:
        shut.path.chmod(0o755)


# ---- a file that grows


def tail_of(tmp_path: Path, first_bytes: int = 100) -> tuple[Tail, Path]:
    path = tmp_path / "file"
    return Tail(Place(tmp_path), path, first_bytes), path


def test_only_what_was_appended_is_read_and_whole_lines_alone(tmp_path: Path) -> None:
    tail, path = tail_of(tmp_path)
    assert tail.read() == ([], False)
    path.write_bytes(b"one\ntwo\nthr")
    assert tail.read() == ([b"one", b"two"], True)
    assert tail.read() == ([], False)
    with path.open("ab") as file:
        file.write(b"ee\nfour\n")
    assert tail.read() == ([b"three", b"four"], False)


def test_it_begins_near_the_end_and_within_no_line(tmp_path: Path) -> None:
    tail, path = tail_of(tmp_path)
    path.write_bytes(b"".join(b"line %03d\n" % i for i in range(100)))
    lines, anew = tail.read()
    assert anew
    assert lines == [b"line %03d" % i for i in range(89, 100)]


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "written over"])
def test_a_file_that_was_cut_begins_anew(tmp_path: Path, replaced: bool) -> None:
    tail, path = tail_of(tmp_path)
    path.write_bytes(b"1\n2\n3\n4\n")
    tail.read()
    if replaced:
        (tmp_path / "new").write_bytes(b"1\n2\nother\nmore\n")
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(b"1\n2\n")
    assert tail.read() == (path.read_bytes().splitlines(), True)
    path.unlink()
    assert tail.read() == ([], True)


def test_much_at_once_is_not_read_through(tmp_path: Path) -> None:
    tail, path = tail_of(tmp_path)
    path.write_bytes(b"first\n")
    tail.read()
    with path.open("ab") as file:
        file.write(b"x" * 99 + b"\n")
        file.write((b"y" * 99 + b"\n") * (MOST_BYTES // 100 + 10))
    lines, anew = tail.read()
    assert anew and len(lines) <= 1


def test_a_line_without_an_end_is_passed_over(tmp_path: Path) -> None:
    tail, path = tail_of(tmp_path)
    path.write_bytes(b"a\n")
    tail.read()
    with path.open("ab") as file:
        file.write(b"z" * MOST_BYTES)
    assert tail.read()[0] == []
    with path.open("ab") as file:
        file.write(b"still the same\nnext\n")
    assert tail.read() == ([b"next"], False)


# ---- the list


def test_a_row_says_what_a_run_is_and_where_it_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", state="running", steps=250, warnings=2)
    with held(run):
        row = rows(Board(tmp_path))["one"]
    assert (row["state"], row["step"], row["total"]) == ("running", 250, 5000)
    assert (row["recipe"], row["model"], row["warned"]) == ("pretrain", "llama 110M", 2)
    found = row["figures"]
    assert isinstance(found, dict)
    assert found["train/loss"] == [250, record(250)["train/loss"]]
    assert found["val/loss"][0] == 200
    seconds = [record(step)["perf/step_s"] for step in range(231, 251)]
    assert row["seconds_left"] == round((5000 - 250) * sum(seconds) / 20)
    assert row["device"] == "8 x NVIDIA H100 80GB HBM3"
    cost = row["cost"]
    assert isinstance(cost, dict) and cost["per_hour"] > 8 and cost["goes_on"]
    assert cost["source"].startswith("8 x H100, RunPod's list price of ")


@pytest.mark.parametrize(
    ("said", "lock", "silent_s", "state"),
    [
        ("running", "held", 0, "running"),
        ("running", "held", 3600, "stalled"),
        ("running", "left", 0, "killed"),
        ("running", "none", 60, "running"),  # a copy that is brought from elsewhere
        ("running", "none", 3600, "stalled"),
        ("failed", "left", 0, "failed"),
        ("failed", "held", 0, "running"),  # started again, and not yet at its first step
        ("stopped", "left", 0, "stopped"),
        ("done", "left", 3600, "done"),
        (None, "none", 0, "new"),
    ],
)
def test_states(tmp_path: Path, said: str | None, lock: str, silent_s: float, state: str) -> None:
    run = make_run(tmp_path / "one", state=said, steps=30)
    run.lock.unlink(missing_ok=True)
    if lock != "none":
        run.lock.touch()
    changed = run.metrics.stat().st_mtime
    board = Board(tmp_path, clock=Clock(changed + silent_s))
    if lock == "held":
        with held(run):
            assert rows(board)["one"]["state"] == state
    else:
        assert rows(board)["one"]["state"] == state


def test_what_was_known_before_the_first_step_is_used(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", state="running", steps=9, train={"total_steps": 100})
    run.log.unlink()
    run.start.write_text(json.dumps({"device": "NVIDIA H200", "world_size": 4, "total_steps": 77}))
    with held(run):
        row = rows(Board(tmp_path))["one"]
    assert (row["device"], row["total"]) == ("4 x NVIDIA H200", 77)
    assert row["cost"]["source"].startswith("4 x H200, ")  # type: ignore[index]


def test_the_newest_validation_is_found_far_before_the_newest_steps(tmp_path: Path) -> None:
    make_run(tmp_path / "one", steps=1999, every=1000)
    figures = rows(Board(tmp_path))["one"]["figures"]
    assert (tmp_path / "one" / "metrics.jsonl").stat().st_size > 4 * METRICS_TAIL
    assert figures["val/loss"][0] == 1000 and figures["train/loss"][0] == 1999  # type: ignore[index]


def test_only_what_changed_is_sent(tmp_path: Path) -> None:
    one, _ = make_run(tmp_path / "one", steps=5), make_run(tmp_path / "two", steps=5)
    board = Board(tmp_path)
    token, found = board.runs()
    assert found["whole"] and len(found["runs"]) == 2 and found["directory"] == str(tmp_path)
    again, found = board.runs(token)
    assert again == token and found["runs"] == [] and "directory" not in found
    grow(one, 6, 7)
    newer, found = board.runs(token)
    assert newer != token and [row["name"] for row in found["runs"]] == ["one"]
    assert found["runs"][0]["figures"]["train/loss"][0] == 7
    assert board.runs("00000000.1")[1]["whole"]  # a page of another server


def test_runs_appear_and_vanish(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", steps=5)
    board = Board(tmp_path)
    token, found = board.runs()
    key = found["runs"][0]["id"]
    make_run(tmp_path / "two", steps=5)
    for file in sorted(one.path.iterdir()):
        file.unlink()
    one.path.rmdir()
    _, found = board.runs(token)
    assert [row["name"] for row in found["runs"]] == ["two"] and found["gone"] == [key]
    assert board.find(key) is None


def test_a_resume_that_cuts_the_record_takes_the_step_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", state="running", steps=40)
    board = Board(tmp_path)
    assert rows(board)["one"]["step"] == 40
    lines = run.metrics.read_text().splitlines(keepends=True)[:20]
    (tmp_path / "cut").write_text("".join(lines))
    os.replace(tmp_path / "cut", run.metrics)
    assert rows(board)["one"]["step"] == 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"step": 3, "train/lo',
        b"\xff\xfe\x00 not text\n",
        b'{"step": "three"}\n[1, 2]\n"a"\nnull\n',
        b'{"step": 99999999999999999999999, "train/loss": 1.0}\n',
        b'{"step": -1, "train/loss": 1.0}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 1, "train/loss": 1' + b"0" * 5000 + b"}\n",
    ],
)
def test_damaged_records_are_no_steps(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path / "one", state=None, steps=1)
    for path in (run.metrics, run.samples, run.status, run.provenance, run.report, run.log, run.config):
        path.write_bytes(content)
    row = rows(Board(tmp_path))["one"]
    assert row["state"] == "new" and "train/loss" not in row["figures"]  # type: ignore[operator]
    json.dumps(row, allow_nan=False)


def test_nan_is_told_by_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=2)
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "train/loss": NaN, "optim/grad_norm": Infinity}\n')
    figures = rows(Board(tmp_path))["one"]["figures"]
    assert figures["train/loss"] == [3, "NaN"] and figures["optim/grad_norm"] == [3, "Infinity"]  # type: ignore[index]


def test_a_long_record_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "one", steps=1)
    line = json.dumps(record(7)).encode() + b"\n"
    with run.metrics.open("ab") as file:
        for _ in range(200):
            file.write(line * 100)
    size = run.metrics.stat().st_size
    read = 0
    before = Tail._lines

    def counted(self: Tail, file: object) -> list[bytes]:
        nonlocal read
        lines = before(self, file)  # type: ignore[arg-type]
        read += sum(len(found) + 1 for found in lines)
        return lines

    monkeypatch.setattr(Tail, "_lines", counted)
    board = Board(tmp_path)
    board.runs()
    log = run.log.stat().st_size
    assert size > 4 << 20 and read <= METRICS_TAIL + log  # lines that were parsed
    read = 0
    grow(run, 8, 8)
    board.runs()
    assert read == len(json.dumps(record(8))) + 1


def test_a_job_knows_the_dollars_of_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one", state="running", steps=9)
    make_job(tmp_path, "one", "runs/one", per_hour=10.0, step=9, total_steps=5000, dollars=3.5)
    with held(run):
        _, found = Board(tmp_path).runs()
    row, job = found["runs"][0], found["jobs"][0]
    assert row["cost"] | {"at": 0} == {
        "per_hour": 10.0, "spent": 3.5, "at": 0, "goes_on": True, "source": "job one",
    }  # fmt: skip
    assert (job["job"], job["run"], job["step"], job["total"]) == ("one", row["id"], 9, 5000)
    assert "run_path" not in job


def test_a_job_that_was_ended_for_standing_still_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", state="running", steps=9)
    make_job(tmp_path, "one", "runs/one", outcome="stalled", stage="ended")
    assert Board(tmp_path).runs()[1]["runs"][0]["state"] == "stalled"


@pytest.mark.parametrize("run_dir", ["../../etc", "/etc", "runs/../../x"])
def test_a_job_names_no_run_outside(tmp_path: Path, run_dir: str) -> None:
    make_job(tmp_path, "one", run_dir)
    assert Board(tmp_path).runs()[1]["jobs"][0]["run"] is None


def test_jobs_of_this_machine_are_shown_from_their_records(tmp_path: Path) -> None:
    from trainway.jobs.record import new_record, save_record

    (tmp_path / "runs").mkdir()
    save_record(new_record("far", "ssh", gpu="H100 SXM", num_gpus=2, dollars_per_hour=5.0, phase="up"))
    job = Board(tmp_path / "runs").runs()[1]["jobs"][0]
    assert (job["job"], job["target"], job["stage"], job["cost"]["per_hour"]) == ("far", "ssh", "up", 5.0)


# ---- settings and secrets


def test_settings_are_by_key_and_secrets_masked() -> None:
    found = read_settings(
        b"recipe: sft\nmodel: {path: /models/Qwen3-8B/}\ntrain: {total_steps: 9}\nx: {hub_token: abcdefgh}\n"
        b"tokenizer: {pad_token: <pad>}\nurl: https://me:password1@host/\n",
        Masker({}),
    )
    assert found.flat["x.hub_token"] == "***" and found.flat["tokenizer.pad_token"] == "<pad>"
    assert found.flat["url"] == "https://***@host/"
    assert (found.recipe, found.model, found.total_steps) == ("sft", "Qwen3-8B", 9)
    assert found.problem == "config.yaml is not a configuration of this version"


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"a: [", b"a: &x [1]\nb: *x\nc: {d: 1}\na: 2\n", b"\xff\xff", b"x: 1\n" * 100_000, b"a: " + b"[" * 50_000],
)  # fmt: skip
def test_a_configuration_that_is_none_is_said(content: bytes) -> None:
    assert read_settings(content, Masker({})).problem


def test_the_masker_knows_the_environment_and_forms() -> None:
    mask = Masker({"MY_SECRET": "plain-words-here", "HF_TOKEN": "short", "PATH": "/usr/bin:/bin"}).text
    assert mask("so plain-words-here is") == "so *** is"
    assert mask(f"login with {CANARY}") == "login with ***"
    assert mask("export WANDB_API_KEY=0123456789abcdef01 done") == "export WANDB_API_KEY=*** done"
    assert mask("loss 3.2 nats per token: 512 tokens, /usr/bin:/bin short") == (
        "loss 3.2 nats per token: 512 tokens, /usr/bin:/bin short"
    )
    assert mask("a\x1b[31mred\x00") == "a\ufffd[31mred\ufffd"


# ---- curves


def merged(
    have: dict[str, dict[str, list[float]]], found: dict[str, object]
) -> dict[str, dict[str, list[float]]]:
    """As the page does it."""
    have = {} if found["whole"] else dict(have)
    for name in found.get("gone", []):  # type: ignore[attr-defined]
        del have[name]
    for name, curve in found["curves"].items():  # type: ignore[attr-defined]
        at, old = curve["at"], have.get(name, {})
        have[name] = {
            key: (old[key][:at] if at else []) + values for key, values in curve.items() if key != "at"
        }
    return have


def test_only_the_end_of_a_curve_is_sent_and_the_sum_is_the_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=500)
    store, page, token, sizes = ChartStore(Place(tmp_path)), {}, "", []
    for before, last in pairwise((499, 500, 501, 560, 900, 901, 1700, 1701)):  # buckets double on the way
        grow(run, before + 1 if before > 499 else 501, last)
        token, found = store.read("x", run.metrics, token)
        sizes.append(len(json.dumps(found)))
        page = merged(page, found)
        assert page == merged({}, ChartStore(Place(tmp_path)).read("x", run.metrics)[1])
    assert len(page["train/loss"]["steps"]) <= MOST_POINTS
    assert sizes[1] < sizes[0] / 20 and sizes[6] < sizes[5] / 20
    assert store.read("x", run.metrics, token) == (token, {"whole": False, "curves": {}, "gone": []})


def test_curves_begin_anew_when_a_resume_cuts_the_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=300)
    store = ChartStore(Place(tmp_path))
    token, found = store.read("x", run.metrics)
    page = merged({}, found)
    lines = run.metrics.read_text().splitlines(keepends=True)[:150]
    run.metrics.write_text("".join(lines))
    grow(run, 149, 160, seed=9)
    token, found = store.read("x", run.metrics, token)
    page = merged(page, found)
    assert page == merged({}, ChartStore(Place(tmp_path)).read("x", run.metrics)[1])
    assert page["train/loss"]["steps"][-1] == 160
    run.metrics.unlink()
    assert merged(page, store.read("x", run.metrics, token)[1]) == {}


def test_a_long_record_is_read_beside_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "one", steps=20)
    monkeypatch.setattr("trainway.board.charts.MUCH_BYTES", 100)
    monkeypatch.setattr("trainway.board.charts.PATIENCE_S", 0.01)
    go, update = threading.Event(), RunSeries.update
    monkeypatch.setattr(RunSeries, "update", lambda self: go.wait(30) and update(self))
    store = ChartStore(Place(tmp_path))
    for _ in range(2):
        assert store.read("x", run.metrics) == (
            "", {"whole": False, "curves": {}, "gone": [], "pending": True},
        )  # fmt: skip
    go.set()
    monkeypatch.setattr("trainway.board.charts.PATIENCE_S", 30)
    _, found = store.read("x", run.metrics)
    assert found["whole"] and found["curves"]["train/loss"]["steps"][-1] == 20


def test_names_are_kept_as_text_whatever_they_are(tmp_path: Path) -> None:
    for name in PAYLOADS:
        make_run(tmp_path / name.replace("/", "_"), steps=2)
    assert sorted(rows(Board(tmp_path))) == sorted(name.replace("/", "_") for name in PAYLOADS)


def test_what_nobody_looks_at_any_more_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChartStore(Place(tmp_path))
    for i in range(14):
        run = make_run(tmp_path / str(i), steps=2)
        store.read(str(i), run.metrics)
    assert list(store._entries) == [str(i) for i in range(4, 14)]
    monkeypatch.setattr("trainway.board.charts.KEPT_S", -1.0)
    store.forget_old()
    assert not store._entries
